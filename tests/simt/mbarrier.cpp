// mbarriers with arrivals and transaction counts, and st.async, whose bytes they count.
#include <algorithm>
#include <cstring>

#include "simt/machine.h"
#include "simt/weak_memory.h"

namespace simt {
namespace {

constexpr uint32_t kMaxArrivals = (1u << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;
constexpr uint64_t kCookie = 0x6d62617272696572;  // what the eight bytes hold while the barrier is intact

void note_use(const void* barrier, bool writes, const char* file, int line) {
  race::atomic_access(*current, barrier, sizeof(uint64_t), writes, /*acquires=*/false, /*releases=*/false, file, line);
}

// The barrier at this address, in any block of the cluster, if the thread that runs may use it.
Mbarrier& find(uint64_t* address, Block*& owner, const char* file, int line) {
  owner = block_of(address);
  if (owner == nullptr || owner->cluster != current->block->cluster) {
    fail("the mbarrier is not in shared memory of this cluster", file, line);
  }
  if (owner->live == 0) fail("the mbarrier's block has ended", file, line);
  const auto found = owner->mbarriers.find(address);
  if (found == owner->mbarriers.end()) fail("the mbarrier is not initialised", file, line);
  Mbarrier& barrier = found->second;
  if (*address != kCookie) fail("the mbarrier's memory has been overwritten", file, line);
  if (owner != current->block) {
    const std::string initialised =
        "the mbarrier initialised at " + place(barrier.file, barrier.line) + " is used by a peer ";
    if (!barrier.fenced) fail(initialised + "without a fence.mbarrier_init", file, line);
    if (owner->cluster->phase <= barrier.initialised_in_phase) {
      fail(initialised + "before a cluster barrier", file, line);
    }
    owner->mapped_in_phase = owner->cluster->phase + 1;
  }
  return barrier;
}

void complete_phase_if_due(Mbarrier& barrier) {
  if (barrier.pending_arrivals != 0 || barrier.pending_bytes != 0) return;
  barrier.completed[barrier.phase & 1].swap(barrier.arriving);
  barrier.arriving.clear();
  ++barrier.phase;
  barrier.pending_arrivals = barrier.expected_arrivals;
  barrier.expect_tx_in_phase = 0;
  ++statistics().barriers;
  note_progress();
}

void expect(Mbarrier& barrier, uint32_t bytes, const char* file, int line) {
  if (++barrier.expect_tx_in_phase > 1 && options().one_expect_tx_per_phase) {
    fail("a second expect_tx in one phase of an mbarrier", file, line);
  }
  barrier.pending_bytes += bytes;
  if (barrier.pending_bytes > kMaxBytes) fail("an mbarrier counts up to 2^20 - 1 bytes", file, line);
}

void arrive(Mbarrier& barrier, uint32_t arrivals, const char* file, int line) {
  if (arrivals == 0 || arrivals > barrier.pending_arrivals) {
    fail("more arrivals at an mbarrier than its phase expects", file, line);
  }
  race::release(*current, barrier.arriving);
  weak::publish(*current);
  barrier.pending_arrivals -= arrivals;
  note_progress();
  complete_phase_if_due(barrier);
}

void deliver(Message& message) {
  Block& receiver = *message.receiver;
  --receiver.messages_under_way;
  std::memcpy(message.destination, message.value, message.bytes);
  race::asynchronous_write_done(message.sender, message.sender_time, message.destination, message.bytes);
  Mbarrier& barrier = receiver.mbarriers.at(message.barrier);
  if (race::enabled) {
    barrier.arriving.resize(message.sent.size());
    for (size_t i = 0; i < message.sent.size(); ++i) {
      barrier.arriving[i] = std::max(barrier.arriving[i], message.sent[i]);
    }
  }
  barrier.pending_bytes -= message.bytes;
  if (barrier.pending_bytes < -kMaxBytes) {
    machine.error = "simt: st.async: an mbarrier counts up to 2^20 - 1 bytes";  // no thread runs that could fail
  }
  note_progress();
  complete_phase_if_due(barrier);
}

}  // namespace

void deliver_messages(bool all_of_them) {
  auto& messages = machine.messages;
  if (options().schedule != Schedule::Fifo) std::shuffle(messages.begin(), messages.end(), machine.random);
  size_t count = messages.size();
  if (!all_of_them && options().messages == Delivery::Mixed) count = machine.random() % messages.size() + 1;
  std::vector<Message> delivered(std::make_move_iterator(messages.end() - static_cast<ptrdiff_t>(count)),
                                 std::make_move_iterator(messages.end()));
  messages.resize(messages.size() - count);
  for (Message& message : delivered) deliver(message);
}

void mbarrier_init(uint64_t* address, uint32_t arrivals, const char* file, int line) {
  note_position("mbarrier.init", file, line);
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) fail("the mbarrier is not 8-byte aligned", file, line);
  Block& block = *current->block;
  if (block_of(address) != &block) fail("the mbarrier is not in this block's shared memory", file, line);
  if (arrivals == 0 || arrivals > kMaxArrivals) fail("an mbarrier expects 1 to 2^20 - 1 arrivals", file, line);
  // Not atomic: whoever uses the barrier has to be ordered after this.
  race::access(*current, address, sizeof *address, /*writes=*/true, file, line);
  Mbarrier fresh;
  fresh.expected_arrivals = fresh.pending_arrivals = arrivals;
  fresh.initialised_by = current->id;
  fresh.initialised_in_phase = block.cluster->phase;
  fresh.file = file;
  fresh.line = line;
  if (!block.mbarriers.emplace(address, fresh).second) fail("the mbarrier is initialised twice", file, line);
  *address = kCookie;
}

void fence_mbarrier_init(const char* file, int line) {
  note_position("fence.mbarrier_init", file, line);
  for (auto& [address, barrier] : current->block->mbarriers) {
    if (barrier.initialised_by == current->id) barrier.fenced = true;
  }
}

void mbarrier_inval(uint64_t* address, const char* file, int line) {
  note_position("mbarrier.inval", file, line);
  Block* owner;
  const Mbarrier& barrier = find(address, owner, file, line);
  if (owner != current->block) fail("mbarrier.inval of another block's mbarrier", file, line);
  if (barrier.pending_bytes != 0) fail("mbarrier.inval while bytes are under way", file, line);
  race::access(*current, address, sizeof *address, /*writes=*/true, file, line);
  owner->mbarriers.erase(address);
}

void mbarrier_arrive(uint64_t* address, uint32_t arrivals, const char* file, int line) {
  note_position("mbarrier.arrive", file, line);
  maybe_switch(file, line);
  Block* owner;
  Mbarrier& barrier = find(address, owner, file, line);
  note_use(address, /*writes=*/true, file, line);
  arrive(barrier, arrivals, file, line);
}

void mbarrier_expect_tx(uint64_t* address, uint32_t bytes, const char* file, int line) {
  note_position("mbarrier.expect_tx", file, line);
  maybe_switch(file, line);
  Block* owner;
  Mbarrier& barrier = find(address, owner, file, line);
  note_use(address, /*writes=*/true, file, line);
  expect(barrier, bytes, file, line);
  complete_phase_if_due(barrier);
}

void mbarrier_arrive_expect_tx(uint64_t* address, uint32_t bytes, const char* file, int line) {
  note_position("mbarrier.arrive.expect_tx", file, line);
  maybe_switch(file, line);
  Block* owner;
  Mbarrier& barrier = find(address, owner, file, line);
  note_use(address, /*writes=*/true, file, line);
  expect(barrier, bytes, file, line);
  arrive(barrier, 1, file, line);
}

bool mbarrier_try_wait(uint64_t* address, uint32_t parity, const char* file, int line) {
  note_position("mbarrier.try_wait", file, line);
  Block* owner;
  if (parity > 1) fail("a phase has parity 0 or 1", file, line);
  Mbarrier& barrier = find(address, owner, file, line);
  if (owner != current->block) fail("mbarrier.try_wait on a barrier of another block", file, line);
  note_use(address, /*writes=*/false, file, line);
  if ((barrier.phase & 1) == parity) poll(file, line);
  if ((barrier.phase & 1) == parity) return false;
  race::acquire(*current, barrier.completed[parity]);
  return true;
}

void st_async(void* remote, const void* value, unsigned bytes, uint64_t* remote_barrier, const char* file, int line) {
  note_position("st.async", file, line);
  maybe_switch(file, line);
  if (bytes != 4 && bytes != 8 && bytes != 16) fail("st.async writes 4, 8 or 16 bytes", file, line);
  if (reinterpret_cast<uintptr_t>(remote) % bytes != 0) fail("st.async: misaligned address", file, line);
  Block* receiver;
  find(remote_barrier, receiver, file, line);
  if (block_of(remote) != receiver) fail("st.async: data and mbarrier are in different blocks", file, line);
  note_use(remote_barrier, /*writes=*/true, file, line);
  const int64_t number = machine.messages_sent++;
  ++statistics().messages;
  if (number == options().lose_message) return;
  race::asynchronous_write(*current, remote, bytes, file, line);
  Message message{receiver, static_cast<char*>(remote), {}, bytes, remote_barrier, current->id, 0, {}};
  std::memcpy(message.value, value, bytes);
  message.sender_time = race::time_of(*current);
  race::release(*current, message.sent);
  ++receiver->messages_under_way;
  if (options().messages == Delivery::Now) {
    deliver(message);
  } else {
    machine.messages.push_back(std::move(message));
  }
}

void check_mbarriers_at_exit(const Block& block) {
  // A kernel that has given up waiting leaves things as they are.
  if (machine.clock_has_leapt) return;
  for (const auto& [address, barrier] : block.mbarriers) {
    if (barrier.pending_bytes == 0) continue;
    fail("the block ends while its mbarrier initialised at " + place(barrier.file, barrier.line) + " is " +
             std::to_string(barrier.pending_bytes) + " bytes away from what it expects",
         current->file, current->line);
  }
}

}  // namespace simt
