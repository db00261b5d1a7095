// Shared memory: one stretch a block, arrays apart from each other, filled with NaNs, with fences between.
//
// A fence is a stretch that no array owns. Under ASan it is poisoned. Without, it holds a pattern that is a NaN in
// every floating-point type, and is looked at when the launch ends.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/fences.h"
#include "simt/machine.h"

namespace simt {
namespace {

constexpr size_t kMaxStatic = 48 * 1024;
constexpr size_t kMaxShared = 227 * 1024;
constexpr size_t kFence = 256;
// Static arrays with their fences have room up to here; the dynamic array comes after it. It is aligned to 128 bytes
// and to no more, as a kernel may assume no more.
constexpr size_t kStaticRoom = 96 * 1024;
constexpr size_t kDynamicOffset = kStaticRoom + kFence + 128;
static_assert(kDynamicOffset % 256 == 128);

struct Arena {
  char* base = nullptr;
  size_t bytes = 0;
  size_t per_block = 0;
};
Arena arena;

size_t dynamic_end() { return kDynamicOffset + machine.config.dynamic_shared; }

void open_array(char* array, size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(array - kFence, bytes + 2 * kFence);
  fill_with_pattern(array - kFence, bytes + 2 * kFence);
  ASAN_POISON_MEMORY_REGION(array - kFence, kFence);
  ASAN_POISON_MEMORY_REGION(array + bytes, kFence);
}

std::string check_fence(const char* from, const char* to, const std::string& what) {
  ASAN_UNPOISON_MEMORY_REGION(from, static_cast<size_t>(to - from));
  const char* changed = first_change(from, to);
  ASAN_POISON_MEMORY_REGION(from, static_cast<size_t>(to - from));
  return changed == nullptr ? "" : what;
}

}  // namespace

void allocate_shared(size_t blocks) {
  const size_t per_block = (dynamic_end() + kFence + 4095) / 4096 * 4096;
  if (arena.bytes < per_block * blocks) {
    ASAN_UNPOISON_MEMORY_REGION(arena.base, arena.bytes);
    std::free(arena.base);
    arena.bytes = per_block * blocks;
    arena.base = static_cast<char*>(std::aligned_alloc(4096, arena.bytes));
    if (arena.base == nullptr) throw std::bad_alloc();
  }
  arena.per_block = per_block;
}

void prepare_shared(Block& block, size_t index) {
  block.shared = arena.base + index * arena.per_block;
  ASAN_POISON_MEMORY_REGION(block.shared, arena.per_block);
  for (const auto& [key, array] : machine.shared_arrays) open_array(block.shared + array.offset, array.bytes);
  open_array(block.shared + kDynamicOffset, machine.config.dynamic_shared);
  constexpr size_t kGranularity = 1;  // neighbouring bytes may belong to different threads
  race::watch(block.shared, arena.per_block, kGranularity, "shared");
}

void retire_shared(Block& block) {
  ASAN_UNPOISON_MEMORY_REGION(block.shared, arena.per_block);
  race::forget(block.shared);
}

std::string check_shared_fences(const Block& block) {
  const auto check = [&](size_t offset, size_t bytes, const std::string& name) {
    const char* array = block.shared + offset;
    const std::string where = " of shared array " + name + " in block " + std::to_string(block.index.x);
    std::string found = check_fence(array - kFence, array, "simt: memory was written before the start" + where);
    if (found.empty())
      found = check_fence(array + bytes, array + bytes + kFence, "simt: memory was written past the end" + where);
    return found;
  };
  for (const auto& [key, array] : machine.shared_arrays) {
    const std::string found = check(array.offset, array.bytes, array.name);
    if (!found.empty()) return found;
  }
  return check(kDynamicOffset, machine.config.dynamic_shared, "(dynamic)");
}

Block* block_of(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto base = reinterpret_cast<uintptr_t>(arena.base);
  if (address < base || arena.per_block == 0) return nullptr;
  const size_t index = (address - base) / arena.per_block;
  return index < machine.blocks.size() ? machine.blocks[index].get() : nullptr;
}

void* shared_array(const void* key, size_t bytes, size_t alignment, const char* name) {
  auto found = machine.shared_arrays.find(key);
  if (found == machine.shared_arrays.end()) {
    const size_t offset = (machine.static_shared_end + kFence + alignment - 1) / alignment * alignment;
    machine.static_shared_end = offset + bytes + kFence;
    size_t in_use = bytes;
    for (const auto& [other, array] : machine.shared_arrays) in_use += array.bytes;
    if (in_use > kMaxStatic || machine.static_shared_end > kStaticRoom) {
      fail("more than 48 KiB of static shared memory", name, 0);
    }
    if (in_use + machine.config.dynamic_shared > kMaxShared) fail("more than 227 KiB of shared memory", name, 0);
    found = machine.shared_arrays.emplace(key, SharedArray{offset, bytes, name}).first;
    for (const auto& block : machine.blocks) open_array(block->shared + offset, bytes);
  }
  return current->block->shared + found->second.offset;
}

void* dynamic_shared() { return current->block->shared + kDynamicOffset; }

uint32_t shared_address(const void* pointer, const char* file, int line) {
  if (block_of(pointer) != current->block) fail("the address is not in this block's shared memory", file, line);
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - current->block->shared);
}

void* shared_pointer(uint32_t address, const char* file, int line) {
  if (address >= arena.per_block) fail("a shared address beyond the block's shared memory", file, line);
  return current->block->shared + address;
}

}  // namespace simt
