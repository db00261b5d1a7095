// The hand-offs of benchmarks/gpu_probes.cuh on the emulator: handoff_driver KERNEL [BLOCKS] [TURNS], of which KERNEL
// is there_and_back, back_off, watched, one_word, silent (of the second launch a block sends nothing) or all_to_all.
// Two launches, one mailbox. How it is emulated: SIMT_... variables. Ends with 0: right, 1: wrong pieces, 2:
// simt::Error, 3: a wait expired.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "gpu_probes.cuh"
#include "simt/global_memory.h"

namespace {

using probes::Wait;

int run(const std::string& kernel, int blocks, int turns) {
  const bool pairs = kernel != "all_to_all";
  const int64_t pieces =
      pairs ? probes::messages_of(blocks, turns) * probes::kMessagePieces : probes::pieces_of_turn(blocks) * turns;
  simt::DeviceBuffer<uint4> mailbox(static_cast<size_t>(pieces), "mailbox");
  simt::DeviceBuffer<uint32_t> words(lstm_ext::cuda::kControlWords, "words"), status(1, 0u, "status");
  simt::DeviceBuffer<probes::Counts> counts(1, probes::Counts{0, 0}, "counts");
  simt::DeviceBuffer<int64_t> clocks(static_cast<size_t>(blocks), "clocks"), nanoseconds(clocks.size(), "nanoseconds");
  for (int launch = 0; launch < 2; ++launch) {
    std::memset(mailbox.data(), 0xff, mailbox.size() * sizeof(uint4));
    std::memset(words.data(), 0xff, words.size() * sizeof(uint32_t));
    probes::HandOffs args{};
    args.mailbox = mailbox.data();
    args.control = {words.data(), nullptr, status.data(), int64_t{1} << 32};
    args.counts = counts.data();
    args.clocks = clocks.data();
    args.nanoseconds = nanoseconds.data();
    args.seed = static_cast<uint32_t>(launch) * 977;
    args.turns = turns;
    args.shift = launch;
    args.silent = kernel == "silent" && launch == 1 ? blocks - 1 : -1;
    lstm_ext::cuda::LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(blocks));
    config.block = dim3(pairs ? probes::kMessagePieces : lstm_ext::cuda::kPersistentThreads);
    config.cooperative = true;
    void (*function)(probes::HandOffs) = &probes::all_to_all;
    if (kernel == "there_and_back" || kernel == "silent") function = &probes::there_and_back<Wait::kAsTheKernels>;
    if (kernel == "back_off") function = &probes::there_and_back<Wait::kBackOff>;
    if (kernel == "watched") function = &probes::there_and_back<Wait::kWatched>;
    if (kernel == "one_word") function = &probes::there_and_back<Wait::kOneWord>;
    lstm_ext::cuda::launch(function, config, args);
    if (status[0] != 0) {
      std::printf("a wait expired\n");
      return 3;
    }
  }
  std::printf("%u wrong pieces, %u parts seen\n", counts[0].wrong, counts[0].parts);
  return counts[0].wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int count, char** words) {
  if (count < 2) return 64;
  const auto number = [&](int index, int otherwise) { return count > index ? std::atoi(words[index]) : otherwise; };
  try {
    return run(words[1], number(2, 4), number(3, 5));
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
