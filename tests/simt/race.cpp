#include "simt/race.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <set>
#include <unordered_map>

#include "simt/machine.h"
#include "simt/race_site.h"

namespace simt::race {

bool enabled = false;

namespace {

// Entry i: up to which time of its own the owner knows thread i. Empty: knows nothing.
using VectorClock = std::vector<uint32_t>;

// An access that the detector remembers: who, at which time of its own, and where in the program.
struct Event {
  uint32_t thread_plus_one = 0;
  uint32_t time = 0;
  Site site = 0;
};

// An asynchronous write that nobody has waited for: later than everything.
constexpr uint32_t kPending = 0xffffffffu;
constexpr int kReaders = 3;
// Clocks take memory and time by the square of it.
constexpr unsigned kMaxThreads = 16384;

// What is remembered of one place in memory. Of many readers, the latest few.
struct Place {
  Event writer;
  Event atomic_writer;  // apart, or an atomic would hide the plain write before it
  Event readers[kReaders];
  Site read_only_reader = 0;
};

struct Watched {
  const char* memory;
  size_t bytes;
  size_t granularity;
  std::string name;
  Place* places;

  size_t count() const { return bytes / granularity + 1; }
  bool contains(const char* address) const { return address >= memory && address < memory + bytes; }
};

unsigned threads = 0;
std::vector<VectorClock> knowledge;         // of each thread
std::vector<VectorClock> fenced_knowledge;  // at its last fence: what a relaxed write of its own then publishes
std::vector<VectorClock> fence_to_acquire;  // what its relaxed loads have seen and its next fence makes known
std::unordered_map<const void*, VectorClock> published;  // by the address of an atomic

std::vector<Watched> watched;  // by address
size_t last_hit = 0;

constexpr size_t kListed = 8;
uint64_t conflicts = 0;
std::set<std::pair<Site, Site>> reported;
std::vector<std::string> reports;

void learn(VectorClock& into, const VectorClock& from) {
  if (from.empty()) return;
  into.resize(threads);
  for (size_t i = 0; i < threads; ++i) into[i] = std::max(into[i], from[i]);
}

void tick(unsigned thread) { ++knowledge[thread][thread]; }

Place* allocate_places(const Watched& range) {
  // Zeroed pages that are never touched cost nothing.
  return static_cast<Place*>(std::calloc(range.count(), sizeof(Place)));
}

bool is_before(const char* address, const Watched& range) { return address < range.memory; }

Watched* find(const char* address) {
  if (last_hit < watched.size() && watched[last_hit].contains(address)) return &watched[last_hit];
  const auto after = std::upper_bound(watched.begin(), watched.end(), address, is_before);
  if (after == watched.begin() || !(after - 1)->contains(address)) return nullptr;
  last_hit = static_cast<size_t>(after - 1 - watched.begin());
  return &watched[last_hit];
}

std::string who(unsigned thread) {
  const Thread& t = machine.threads[thread];
  return "block " + std::to_string(t.block->index.x) + " thread " + std::to_string(t.id % t.block->size);
}

bool first_of_its_kind(Site one, Site other) {
  ++conflicts;
  return reported.insert({one, other}).second && reports.size() < kListed;
}

void report(const Watched& range, size_t place, unsigned thread, bool writes, Site site, const Event& earlier,
            bool earlier_writes) {
  if (!first_of_its_kind(site, earlier.site)) return;
  std::string text = "race on " + range.name + " memory, byte " + std::to_string(place * range.granularity) + ": " +
                     (writes ? "write" : "read") + " by " + who(thread) + " at " + describe(site) + ", unordered with ";
  if (earlier.time == kPending) {
    text += "the asynchronous write issued by " + who(earlier.thread_plus_one - 1);
  } else {
    text += std::string("the ") + (earlier_writes ? "write" : "read") + " by " + who(earlier.thread_plus_one - 1);
  }
  reports.push_back(text + " at " + describe(earlier.site));
}

bool unordered(const Event& earlier, unsigned thread, Site site) {
  if (earlier.thread_plus_one == 0) return false;
  if (is_atomic(site) && is_atomic(earlier.site)) return false;
  if (earlier.time == kPending) return true;
  const unsigned other = earlier.thread_plus_one - 1;
  return other != thread && earlier.time > knowledge[thread][other];
}

void remember_reader(Place& place, unsigned thread, const Event& event) {
  Event* slot = nullptr;
  for (Event& reader : place.readers) {
    if (reader.thread_plus_one == thread + 1) slot = &reader;
  }
  for (Event& reader : place.readers) {
    if (slot != nullptr) break;
    const bool known = reader.thread_plus_one == 0 || reader.time <= knowledge[thread][reader.thread_plus_one - 1];
    if (known) slot = &reader;
  }
  if (slot == nullptr) slot = &place.readers[(thread * 2654435761u >> 16) % kReaders];
  *slot = event;
}

// Calls `visit(range, index of place)` for the places of an access to watched memory.
template <typename Visit>
void for_each_place(const void* address, size_t bytes, Visit visit) {
  const char* at = static_cast<const char*>(address);
  Watched* range = find(at);
  if (range == nullptr || bytes == 0) return;
  const size_t offset = static_cast<size_t>(at - range->memory);
  const size_t last = std::min((offset + bytes - 1) / range->granularity, range->count() - 1);
  for (size_t i = offset / range->granularity; i <= last; ++i) visit(*range, i);
}

}  // namespace

void check_access(unsigned thread, const void* address, size_t bytes, bool writes, Site site, bool asynchronous) {
  const bool too_early = waits_for_launch(machine.threads[thread], address, writes);
  for_each_place(address, bytes, [&](Watched& range, size_t index) {
    if (too_early && first_of_its_kind(site, site)) {
      reports.push_back(std::string(writes ? "write at " : "read at ") + describe(site) +
                        " of global memory that is not constant, before grid_dependency_wait");
    }
    Place& place = range.places[index];
    const Event event{thread + 1, asynchronous ? kPending : knowledge[thread][thread], site};
    for (const Event* writer : {&place.writer, &place.atomic_writer}) {
      if (unordered(*writer, thread, site)) report(range, index, thread, writes, site, *writer, true);
    }
    if (!writes) {
      remember_reader(place, thread, event);
      return;
    }
    for (Event& reader : place.readers) {
      if (unordered(reader, thread, site)) report(range, index, thread, true, site, reader, false);
      reader = Event{};
    }
    if (place.read_only_reader != 0 && first_of_its_kind(site, place.read_only_reader)) {
      reports.push_back("read through the read-only cache at " + describe(place.read_only_reader) +
                        " of memory that the same launch writes at " + describe(site));
    }
    (is_atomic(site) ? place.atomic_writer : place.writer) = event;
  });
}

void begin(unsigned count) {
  if (!enabled) return;
  if (count > kMaxThreads) {
    throw Error("simt: " + std::to_string(count) + " threads at once, and the race detector follows up to " +
                std::to_string(kMaxThreads) + ": fewer resident_blocks, or a smaller case");
  }
  threads = count;
  knowledge.assign(count, VectorClock(count, 0));
  for (unsigned i = 0; i < count; ++i) tick(i);
  fenced_knowledge.assign(count, {});
  fence_to_acquire.assign(count, {});
  published.clear();
  conflicts = 0;
  reported.clear();
  reports.clear();
  for (Watched& range : watched) {
    std::free(range.places);
    range.places = allocate_places(range);
  }
}

std::string findings() {
  if (conflicts == 0) return "";
  std::string text = "simt: " + std::to_string(conflicts) + " racy accesses";
  for (const std::string& line : reports) text += "\n    " + line;
  return text;
}

void watch(const void* memory, size_t bytes, size_t granularity, const std::string& name) {
  if (!enabled) return;
  forget(memory);
  Watched range{static_cast<const char*>(memory), bytes, granularity, name, nullptr};
  range.places = allocate_places(range);
  watched.insert(std::upper_bound(watched.begin(), watched.end(), range.memory, is_before), range);
}

void forget(const void* memory) {
  for (size_t i = 0; i < watched.size(); ++i) {
    if (watched[i].memory != memory) continue;
    std::free(watched[i].places);
    watched.erase(watched.begin() + static_cast<ptrdiff_t>(i));
    return;
  }
}

void meet(Thread* const* meeting, size_t count) {
  if (!enabled) return;
  VectorClock all(threads, 0);
  for (size_t i = 0; i < count; ++i) learn(all, knowledge[meeting[i]->id]);
  for (size_t i = 0; i < count; ++i) {
    knowledge[meeting[i]->id] = all;
    tick(meeting[i]->id);
  }
}

void fence(Thread& thread) {
  if (!enabled) return;
  learn(knowledge[thread.id], fence_to_acquire[thread.id]);
  fenced_knowledge[thread.id] = knowledge[thread.id];
  tick(thread.id);
}

void access(Thread& thread, const void* address, size_t bytes, bool writes, const char* file, int line) {
  if (enabled) check_access(thread.id, address, bytes, writes, site_of(file, line), /*asynchronous=*/false);
}

void asynchronous_write(Thread& thread, const void* address, size_t bytes, const char* file, int line) {
  if (enabled) check_access(thread.id, address, bytes, /*writes=*/true, site_of(file, line), /*asynchronous=*/true);
}

void asynchronous_write_done(const Thread& thread, const void* address, size_t bytes) {
  if (!enabled) return;
  for_each_place(address, bytes, [&](Watched& range, size_t index) {
    Event& writer = range.places[index].writer;
    if (writer.thread_plus_one == thread.id + 1 && writer.time == kPending)
      writer.time = knowledge[thread.id][thread.id];
  });
}

void atomic_access(Thread& thread, const void* address, size_t bytes, bool writes, const char* file, int line) {
  if (!enabled) return;
  check_access(thread.id, address, bytes, writes, as_atomic(site_of(file, line)), /*asynchronous=*/false);
  VectorClock& here = published[address];
  learn(fence_to_acquire[thread.id], here);
  if (writes) learn(here, fenced_knowledge[thread.id]);
}

void read_only_access(Thread& thread, const void* address, size_t bytes, const char* file, int line) {
  if (!enabled) return;
  const Site site = site_of(file, line);
  for_each_place(address, bytes, [&](Watched& range, size_t index) {
    Place& place = range.places[index];
    place.read_only_reader = site;
    for (const Event* writer : {&place.writer, &place.atomic_writer}) {
      if (writer->thread_plus_one == 0 || !first_of_its_kind(site, writer->site)) continue;
      reports.push_back("read through the read-only cache at " + describe(site) +
                        " of memory that the same launch has written at " + describe(writer->site));
    }
  });
  check_access(thread.id, address, bytes, /*writes=*/false, site, /*asynchronous=*/false);
}

}  // namespace simt::race
