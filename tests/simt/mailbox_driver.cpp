// Two chunks of the toy mailbox, one workspace: mailbox_driver mailbox [BUG] [STEPS] [BATCH] [BLOCKS]. How it is
// emulated: SIMT_... variables. Ends as toy_driver does, with 0: right, 1: wrong numbers, 2: simt::Error, 3: a wait
// expired.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "simt/global_memory.h"
#include "simt/toy_mailbox.cuh"

namespace {

constexpr int kPieces = 4;
constexpr int kRows = 16;
constexpr int kChunks = 2;

// One step, as it should be.
std::vector<uint4> step_of(const std::vector<uint4>& before, int batch, int pieces) {
  std::vector<uint4> after(before.size());
  for (int row = 0; row < batch; ++row) {
    uint32_t sum = 0;
    for (int p = 0; p < pieces; ++p) sum += toy::digest_of(before[row * pieces + p], p);
    for (int p = 0; p < pieces; ++p) after[row * pieces + p] = toy::piece_of(sum, p);
  }
  return after;
}

bool same(const uint4* got, const std::vector<uint4>& wanted) {
  return std::memcmp(got, wanted.data(), wanted.size() * sizeof(uint4)) == 0;
}

int run(int bug, int steps, int batch, int blocks) {
  const int pieces = blocks * kPieces;
  const size_t row_pieces = static_cast<size_t>(batch) * pieces;
  simt::DeviceBuffer<uint4> mailbox(steps * row_pieces, "mailbox"), outputs(steps * row_pieces, "outputs");
  simt::DeviceBuffer<uint4> state(row_pieces, "state"), last(row_pieces, "last");
  simt::DeviceBuffer<uint32_t> flags(steps * row_pieces, "flags"), status(1, 0u, "status");
  std::vector<uint4> wanted(row_pieces);
  for (size_t i = 0; i < row_pieces; ++i)
    wanted[i] = toy::piece_of(static_cast<uint32_t>(i) * 40503u, static_cast<int>(i));
  bool right = true;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    std::copy(wanted.begin(), wanted.end(), state.begin());
    if (bug != toy::kNoMemset || chunk == 0) std::memset(mailbox.data(), 0xff, mailbox.size() * sizeof(uint4));
    std::fill(flags.begin(), flags.end(), 0u);
    lstm_ext::cuda::LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(blocks));
    config.block = dim3(kPieces * kRows);
    config.cooperative = true;
    lstm_ext::cuda::launch(toy::mailbox<kPieces, kRows>, config,
                           toy::MailboxArguments{mailbox.data(), flags.data(), state.data(), last.data(),
                                                 outputs.data(), status.data(), steps, batch, bug});
    if (status[0] != 0) {
      std::printf("a wait expired\n");
      return 3;
    }
    for (int t = 0; t < steps; ++t) {
      wanted = step_of(wanted, batch, pieces);
      right = right && same(&outputs[t * row_pieces], wanted);
    }
    right = right && same(last.data(), wanted);
  }
  const simt::Statistics& did = simt::statistics();
  std::printf("%llu switches, %llu polls, %llu late stores, %llu stale loads\n",
              static_cast<unsigned long long>(did.switches), static_cast<unsigned long long>(did.polls),
              static_cast<unsigned long long>(did.stores), static_cast<unsigned long long>(did.stale_loads));
  if (right) return 0;
  std::printf("wrong numbers\n");
  return 1;
}

}  // namespace

int main(int count, char** words) {
  const auto number = [&](int index, int otherwise) { return count > index ? std::atoi(words[index]) : otherwise; };
  if (count < 2) return 64;
  try {
    return run(number(2, toy::kRight), number(3, 6), number(4, 13), number(5, 3));
  } catch (const simt::Error& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
}
