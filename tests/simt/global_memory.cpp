#include "simt/global_memory.h"

#include <cstdlib>
#include <iterator>
#include <map>
#include <new>

#include "simt/fences.h"
#include "simt/machine.h"
#include "simt/weak_memory.h"

namespace simt {
namespace {

// cudaMalloc aligns to 256 bytes; no more here, lest a kernel come to rely on it.
constexpr size_t kAlignment = 256;
constexpr size_t kFence = 4096 + kAlignment;

// Not a variable of this file's own, which a buffer of static storage duration might outlive.
std::vector<const FencedMemory*>& buffers() {
  static auto* alive = new std::vector<const FencedMemory*>;
  return *alive;
}

void check_alignment(const void* address, unsigned bytes, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fail("an access of " + std::to_string(bytes) + " bytes that is not aligned to them", file, line);
}

// The ends of the ranges, by their beginnings.
std::map<const char*, const char*>& constants() {
  static auto* known = new std::map<const char*, const char*>;
  return *known;
}

}  // namespace

FencedMemory::FencedMemory(size_t bytes, size_t granularity, std::string name) : bytes_(bytes), name_(std::move(name)) {
  const size_t whole = (2 * kFence + bytes + 4095) / 4096 * 4096;
  allocation_ = static_cast<char*>(std::aligned_alloc(4096, whole));
  if (allocation_ == nullptr) throw std::bad_alloc();
  data_ = allocation_ + kFence;
  fill_with_pattern(allocation_, 2 * kFence + bytes);
  ASAN_POISON_MEMORY_REGION(allocation_, kFence);
  ASAN_POISON_MEMORY_REGION(data_ + bytes_, whole - kFence - bytes_);
  buffers().push_back(this);
  race::watch(data_, bytes_, std::min<size_t>(granularity, 4), name_);
}

FencedMemory::~FencedMemory() {
  race::forget(data_);
  auto& alive = buffers();
  alive.erase(std::find(alive.begin(), alive.end(), this));
  ASAN_UNPOISON_MEMORY_REGION(allocation_, 2 * kFence + bytes_);
  std::free(allocation_);
}

std::string FencedMemory::check() const {
  const auto changed = [](const char* from, const char* to) {
    ASAN_UNPOISON_MEMORY_REGION(from, static_cast<size_t>(to - from));
    const bool found = first_change(from, to) != nullptr;
    ASAN_POISON_MEMORY_REGION(from, static_cast<size_t>(to - from));
    return found;
  };
  const char* end = data_ + bytes_;
  if (changed(data_ - kFence, data_)) return "simt: memory was written before the start of buffer " + name_;
  if (changed(end, end + kFence)) return "simt: memory was written past the end of buffer " + name_;
  return "";
}

std::string check_global_fences() {
  for (const FencedMemory* buffer : buffers()) {
    std::string found = buffer->check();
    if (!found.empty()) return found;
  }
  return "";
}

ConstantMemory::ConstantMemory(const void* memory, size_t bytes) : memory_(static_cast<const char*>(memory)) {
  constants()[memory_] = memory_ + bytes;
}

ConstantMemory::~ConstantMemory() { constants().erase(memory_); }

bool waits_for_launch(const Thread& thread, const void* address, bool writes) {
  if (thread.waited_for_launch || block_of(address) != nullptr) return false;
  const auto* place = static_cast<const char*>(address);
  const auto after = constants().upper_bound(place);
  return writes || after == constants().begin() || std::prev(after)->second <= place;
}

void grid_dependency_wait(const char* file, int line) {
  note_position("griddepcontrol.wait", file, line);
  maybe_switch(file, line);
  current->waited_for_launch = true;
}

void atomic_load(void* value, const void* address, unsigned bytes, unsigned part, const char* file, int line) {
  check_alignment(address, bytes, file, line);
  poll(file, line);
  for (unsigned at = 0; at < bytes; at += part) {
    race::atomic_access(*current, static_cast<const char*>(address) + at, part, /*writes=*/false, file, line);
  }
  weak::load(*current, value, address, bytes);
}

void relaxed_store(void* address, const void* value, unsigned bytes, unsigned part, const char* file, int line) {
  note_position("relaxed store", file, line);
  check_alignment(address, bytes, file, line);
  maybe_switch(file, line);
  note_progress();
  if (bytes == 16 && ++statistics().pieces == options().lost_piece) return;
  for (unsigned at = 0; at < bytes; at += part) {
    race::atomic_access(*current, static_cast<char*>(address) + at, part, /*writes=*/true, file, line);
  }
  weak::store(*current, address, value, bytes, part);
}

void before_atomic_write(const void* address, unsigned bytes, const char* file, int line) {
  note_position("atomic", file, line);
  maybe_switch(file, line);
  note_progress();
  race::atomic_access(*current, address, bytes, /*writes=*/true, file, line);
  weak::settle(address, bytes);
}

void before_read_only_load(const void* address, unsigned bytes, const char* file, int line) {
  note_position("read-only load", file, line);
  race::read_only_access(*current, address, bytes, file, line);
}

void thread_fence(const char* file, int line) {
  note_position("__threadfence", file, line);
  maybe_switch(file, line);
  race::fence(*current);
  weak::publish(*current);
}

}  // namespace simt
