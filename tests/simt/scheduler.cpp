// Which thread runs, when it stops, and what happens when none can go on.
#include <algorithm>
#include <exception>

#include "simt/machine.h"
#include "simt/weak_memory.h"

// The CUDA names of the thread that runs, set at every switch.
uint3 threadIdx{};
uint3 blockIdx{};
dim3 blockDim;
dim3 gridDim;

namespace simt {

Machine machine;
Thread* current = nullptr;

namespace {

// Without progress for so many polls per thread that can run, everything else has had its turn: what polls now waits
// for something that no running thread will do.
constexpr uint64_t kQuietPollsPerThread = 64;
// Then the clock leaps, each time so much further, once a thread has read it twice since the last leap. A wait bounded
// by it ends in one of the leaps; what still polls after them is not bounded.
constexpr int kLeapBits = 4;
constexpr int kLeaps = 14;
// Who bounds a wait reads the clock at one in 256 tries (cuda/platform.h) of up to 16 loads. Where nobody has for
// longer, nobody does.
constexpr uint64_t kPollsPerClockReading = 256 * 16;

uint64_t quiet_polls() { return 256 + kQuietPollsPerThread * machine.live; }

uint64_t urgency(const Thread& thread) { return thread.polling ? 0 : *thread.priority; }

Thread* take_ready() {
  auto& ready = machine.ready;
  size_t& head = machine.ready_head;
  const size_t waiting = ready.size() - head;
  if (waiting == 0) return nullptr;
  if (options().schedule == Schedule::Random) {
    std::swap(ready[head], ready[head + machine.random() % waiting]);
  } else if (options().schedule == Schedule::Priority) {
    // The best of a sample, or a switch would take time in proportion to the number of threads.
    size_t best = head + machine.random() % waiting;
    for (int i = 0; i < 16; ++i) {
      const size_t other = head + machine.random() % waiting;
      if (urgency(*ready[other]) > urgency(*ready[best])) best = other;
    }
    std::swap(ready[head], ready[best]);
    if (draw(64)) *ready[head]->priority = machine.random();
  }
  Thread* thread = ready[head++];
  thread->queued = false;
  if (head == ready.size()) {
    ready.clear();
    head = 0;
  } else if (head > 4096 && head * 2 > ready.size()) {
    ready.erase(ready.begin(), ready.begin() + static_cast<ptrdiff_t>(head));
    head = 0;
  }
  return thread;
}

void thread_main() {
  arrived_on_new_stack(machine.main);
  try {
    machine.body();
    check_thread_exit(*current);
  } catch (const std::exception& error) {
    machine.error = std::string("simt: the kernel threw: ") + error.what() + position_of(*current);
  }
  current->finished = true;
  switch_context(current->context, machine.main, /*from_ends=*/true);
}

void resume(Thread& thread) {
  if (!thread.started) {
    thread.started = true;
    prepare(thread.context, machine.stacks.take(options().stack_bytes), thread_main);
  }
  current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
  ++machine.clock;
  switch_context(machine.main, thread.context);
  current = nullptr;
  // Not before it has left its stack for good.
  if (thread.finished) machine.stacks.give_back(thread.context.stack);
}

}  // namespace

Statistics& statistics() {
  static Statistics counts;
  return counts;
}

std::string place(const char* file, int line) {
  const std::string path = file;
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
}

std::string position_of(const Thread& thread) {
  const auto triple = [](const uint3& at) {
    return std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z);
  };
  return " [block " + triple(thread.block->index) + " thread " + triple(thread.index) + " at " +
         place(thread.file, thread.line) + "]";
}

void note_position(const char* doing, const char* file, int line) {
  if (current == nullptr) throw Error(std::string("simt: ") + doing + " outside a kernel");
  current->doing = doing;
  current->file = file;
  current->line = line;
}

void fail(const std::string& message, const char* file, int line) {
  if (current == nullptr) throw Error("simt: " + message);
  note_position(current->doing, file, line);
  machine.error = "simt: " + message + position_of(*current);
  // The launch is over: no thread is resumed any more, this one neither.
  switch_context(current->context, machine.main);
  std::terminate();
}

// Reading it takes time, or a thread that only looks at it would look forever.
int64_t clock() {
  ++machine.clock;
  if (current != nullptr && machine.polls_without_progress > quiet_polls()) {
    machine.polls_at_clock_reading = machine.polls_without_progress;
    if (current->leap_seen == machine.leaps) {
      ++machine.leaps;
      machine.clock += int64_t{1} << kLeapBits * std::min(++machine.leaps_without_progress, kLeaps);
    }
    current->leap_seen = machine.leaps;
  }
  return machine.clock;
}

void note_progress() {
  machine.polls_without_progress = 0;
  machine.polls_at_clock_reading = 0;
  machine.leaps_without_progress = 0;
}

void make_ready(Thread* thread) {
  if (thread->queued || thread->finished) return;
  thread->queued = true;
  machine.ready.push_back(thread);
}

void wait_here(const char* doing, const char* file, int line) {
  note_position(doing, file, line);
  switch_context(current->context, machine.main);
}

void poll(const char* file, int line) {
  ++statistics().polls_of_launch;
  const uint64_t polls = ++machine.polls_without_progress;
  // All that can run have polled once: nobody is about to do anything else.
  if (polls >= machine.live + 16 && weak::pending()) {
    weak::reveal_some();
  } else {
    const uint64_t unread = polls - machine.polls_at_clock_reading;
    if (unread > quiet_polls() + kPollsPerClockReading * machine.live || machine.leaps_without_progress > kLeaps) {
      fail("livelock: every thread that can run is polling, and no wait is bounded", file, line);
    }
  }
  current->polling = true;
  make_ready(current);
  wait_here("polling", file, line);
  current->polling = false;
}

void maybe_switch(const char* file, int line) {
  if (options().schedule == Schedule::Fifo || !draw(4)) return;
  make_ready(current);
  wait_here("running", file, line);
}

void run_threads() {
  machine.running = true;
  while (machine.error.empty()) {
    if (options().stores == Delivery::Mixed && weak::pending() && draw(8)) weak::reveal_some();
    Thread* thread = take_ready();
    if (thread == nullptr) break;
    resume(*thread);
  }
  machine.running = false;
}

}  // namespace simt
