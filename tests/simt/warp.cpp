// Collective operations of a warp: __syncwarp, shuffles, votes; mma and ldmatrix are built on them.
#include "simt/warp.h"

#include <cstring>

#include "simt/weak_memory.h"

namespace simt {
namespace {

const char* const kBallot = "__ballot_sync";

Collective& collective_of(Warp& warp, uint32_t mask) {
  for (const auto& collective : warp.collectives) {
    if (collective->mask == mask) return *collective;
  }
  warp.collectives.push_back(std::make_unique<Collective>());
  warp.collectives.back()->mask = mask;
  return *warp.collectives.back();
}

unsigned source_lane(Shuffle kind, unsigned lane, uint32_t argument, unsigned width) {
  const unsigned first = lane & ~(width - 1);
  const unsigned within = lane & (width - 1);
  switch (kind) {
    case Shuffle::Index: return first + (argument & (width - 1));
    case Shuffle::Down: return argument >= width - within ? lane : lane + argument;
    case Shuffle::Xor: return (within ^ argument) >= width ? lane : first + (within ^ argument);
  }
  return lane;
}

}  // namespace

unsigned lane_index() { return current->lane; }

Collective::Slot* collective(const char* operation, uint32_t mask, bool orders_memory, const Collective::Slot& own,
                             void (*finish)(Collective::Slot*), const char* file, int line) {
  note_position(operation, file, line);
  Thread& thread = *current;
  Warp& warp = *thread.warp;
  const uint32_t own_bit = 1u << thread.lane;
  const std::string name = operation;
  if ((mask & own_bit) == 0) fail(name + ": the mask lacks the lane itself", file, line);
  if ((mask & ~warp.live) != 0) fail(name + ": the mask names a lane that has left or does not exist", file, line);
  Collective& here = collective_of(warp, mask);
  if (here.arrived == 0) {
    here.operation = operation;
    here.line = line;
  } else if (std::strcmp(here.operation, operation) != 0) {
    fail(name + ": other lanes are in " + here.operation + " at line " + std::to_string(here.line), file, line);
  }
  Collective::Slot* slots = here.slots[here.generation & 1];
  slots[thread.lane] = own;
  here.arrived |= own_bit;
  here.lanes[here.count++] = &thread;
  if (here.arrived != mask) {
    wait_here(operation, file, line);
    return slots;
  }
  if (finish != nullptr) finish(slots);
  if (orders_memory) {
    race::meet(here.lanes, here.count);
    weak::meet(here.lanes, here.count);
  }
  for (unsigned i = 0; i < here.count; ++i) {
    if (here.lanes[i] != &thread) make_ready(here.lanes[i]);
  }
  here.arrived = 0;
  here.count = 0;
  ++here.generation;
  // Threads that poll may vote on it at each try: a vote alone brings nobody further.
  if (std::strcmp(operation, kBallot) != 0) note_progress();
  maybe_switch(file, line);
  return slots;
}

void syncwarp(uint32_t mask, const char* file, int line) {
  collective("__syncwarp", mask, /*orders_memory=*/true, {}, nullptr, file, line);
}

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, uint32_t argument, int width, const char* file,
                 int line) {
  static const char* const kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  const char* name = kNames[static_cast<int>(kind)];
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(std::string(name) + ": the width is not a power of two up to 32", file, line);
  }
  Collective::Slot own;
  own.value = value;
  const Collective::Slot* slots = collective(name, mask, /*orders_memory=*/false, own, nullptr, file, line);
  const unsigned source = source_lane(kind, current->lane, argument, static_cast<unsigned>(width));
  if ((mask >> source & 1) == 0) fail(std::string(name) + ": reads a lane outside the mask", file, line);
  return slots[source].value;
}

uint32_t ballot(uint32_t mask, bool predicate, const char* file, int line) {
  Collective::Slot own;
  own.value = predicate ? 1 : 0;
  const Collective::Slot* slots = collective(kBallot, mask, false, own, nullptr, file, line);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) != 0 && slots[lane].value != 0) votes |= 1u << lane;
  }
  return votes;
}

}  // namespace simt
