// How a launch is emulated. A driver sets simt::options() before it launches; the environment sets the defaults.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// Which of the threads that can run goes next.
enum class Schedule {
  Fifo,      // in turn
  Random,    // any
  Priority,  // by priorities drawn per thread, warp or block (the seed chooses) and redrawn now and then
};

// When an asynchronous operation takes effect.
enum class Delivery {
  Now,    // when it is issued
  Late,   // as late as its rules allow
  Mixed,  // at any moment between
};

// How a tensor core adds up the products of one mma.
enum class MmaSum {
  Exact,      // exactly, rounded once
  Truncated,  // terms aligned with the largest, low bits dropped, the sum truncated
};

struct Options {
  Schedule schedule = Schedule::Fifo;  // SIMT_SCHEDULE=fifo|random|priority
  uint64_t seed = 1;                   // SIMT_SEED
  Delivery copies = Delivery::Late;    // SIMT_COPIES=now|late|mixed, cp.async
  // When a relaxed store can be seen by threads that nothing has told of it. Late, mixed: by each block at a time of
  // its own, in any order.
  Delivery stores = Delivery::Now;  // SIMT_STORES=now|late|mixed
  // Where stores are late or mixed: the words of a vector are seen each on its own.
  bool torn = false;           // SIMT_PIECES=whole|torn
  MmaSum mma = MmaSum::Exact;  // SIMT_MMA=exact|truncated
  int mma_bits = 24;           // Truncated: bits kept below the largest exponent
  // Blocks alive at once in a launch that is not cooperative; 0: all of them, up to a bound on threads.
  unsigned resident_blocks = 0;
  // The most blocks of a cooperative launch; 0: any number. One with more is refused.
  unsigned cooperative_blocks = 0;
  // Of the relaxed stores of 16 bytes, the number of the one that is lost (Statistics::pieces); 0: none.
  uint64_t lost_piece = 0;
  // Of kernels that nvcc's PTX has been translated of: their accesses to shared memory, printed when the program ends.
  bool counts_wavefronts = false;  // SIMT_WAVEFRONTS=no|yes
  size_t stack_bytes = 0;          // of a thread; 0: enough for this build
};

// What launches did.
struct Statistics {
  uint64_t launches = 0;
  uint64_t refused = 0;          // for more blocks than Options::cooperative_blocks
  uint64_t polls_of_launch = 0;  // of the last one
  uint64_t pieces = 0;           // relaxed stores of 16 bytes
};

Options options_of_environment();
Options& options();
Statistics& statistics();

}  // namespace simt
