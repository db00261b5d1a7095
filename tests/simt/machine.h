// The emulator's own state: threads, warps and blocks of the launch that runs. Not for drivers.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "simt/emulator.h"
#include "simt/fiber.h"
#include "simt/race.h"

namespace simt {

struct Block;
struct Thread;
struct Warp;

// One cp.async that has not taken effect, or whose effect nobody has waited for.
struct AsyncCopy {
  char* shared;
  const char* global;
  unsigned source_bytes;
  bool done;
};

struct Thread {
  Context context;
  uint3 index{};
  unsigned lane = 0;
  unsigned id = 0;  // among the threads that are alive
  Block* block = nullptr;
  Warp* warp = nullptr;
  bool started = false;
  bool finished = false;
  bool queued = false;
  bool polling = false;
  bool waited_for_launch = true;  // the one in front of this one has ended
  uint64_t leap_seen = 0;         // the last one that it has read the clock after
  uint64_t* priority = nullptr;
  // What it does or waits for, and where.
  const char* doing = "start";
  const char* file = "";
  int line = 0;
  // cp.async
  std::vector<AsyncCopy> open_group;
  std::vector<std::vector<AsyncCopy>> groups;
};

// A collective operation of some lanes of a warp. A lane may enter the next one while others still read the results of
// this one, so the slots are doubled.
struct Collective {
  struct Slot {
    uint64_t value = 0;
    const void* inputs[3] = {};
    void* output = nullptr;
  };
  uint32_t mask = 0;
  uint32_t arrived = 0;
  uint64_t generation = 0;
  const char* operation = nullptr;
  int line = 0;
  Slot slots[2][32];
  Thread* lanes[32];
  unsigned count = 0;
};

struct Warp {
  uint32_t live = 0;
  std::vector<std::unique_ptr<Collective>> collectives;  // by mask
};

struct BlockBarrier {
  std::vector<Thread*> waiting;
  const char* file = "";
  int line = 0;
};

struct Block {
  uint3 index{};
  unsigned number = 0;  // among the blocks that are alive
  unsigned size = 0;
  unsigned live = 0;
  std::vector<Warp> warps;
  std::vector<Thread*> threads;
  BlockBarrier barrier;
  char* shared = nullptr;
};

// A shared array, at the same place in every block of a launch.
struct SharedArray {
  size_t offset;
  size_t bytes;
  std::string name;
};

struct Machine {
  LaunchConfig config;
  std::function<void()> body;
  std::mt19937_64 random;
  bool running = false;
  std::string error;

  Context main;
  StackPool stacks;
  std::vector<Thread> threads;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<uint64_t> priorities;
  unsigned live = 0;

  std::vector<Thread*> ready;
  size_t ready_head = 0;
  int64_t clock = 0;
  uint64_t leaps = 1;
  int leaps_without_progress = 0;
  uint64_t polls_without_progress = 0;
  uint64_t polls_at_clock_reading = 0;

  std::map<const void*, SharedArray> shared_arrays;
  size_t static_shared_end = 0;
};

extern Machine machine;
// The thread that runs; null outside a launch.
extern Thread* current;

// ---- scheduler.cpp

void note_position(const char* doing, const char* file, int line);
void make_ready(Thread* thread);
// Lets others run until somebody makes this thread ready.
void wait_here(const char* doing, const char* file, int line);
// One turn of a polling loop: everybody else may run first.
void poll(const char* file, int line);
// Other threads may run here, as they may anywhere on a GPU.
void maybe_switch(const char* file, int line);
// Something happened that a waiting thread may have been waiting for.
void note_progress();
// Runs the threads of the machine until all have ended or none can go on.
void run_threads();

// ---- the parts of a launch

std::string place(const char* file, int line);  // "file:line", the file without its folders
std::string position_of(const Thread& thread);
// block_barrier.cpp: the rules for leaving
void check_thread_exit(Thread& thread);
// shared_memory.cpp
void allocate_shared(size_t blocks);
void prepare_shared(Block& block, size_t index);
void retire_shared(Block& block);
std::string check_shared_fences(const Block& block);
Block* block_of(const void* pointer);  // null where it does not point to shared memory
// global_memory.cpp
std::string check_global_fences();
// Whether this thread's launch may still write what is there, or has not ended reading it: the thread has to wait
// first.
bool waits_for_launch(const Thread& thread, const void* address, bool writes);

inline bool draw(unsigned one_in) { return machine.random() % one_in == 0; }

}  // namespace simt
