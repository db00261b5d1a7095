#include "torch/scratch.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace lstm_ext {
namespace {

// The C library keeps smaller blocks itself.
constexpr size_t kLeastBytes = size_t{64} << 10;
constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kMostTimes = 4;  // a block larger than this multiple of a request is neither used nor freed for it

struct Block {
  void* data;
  size_t bytes;
};

// Blocks that no call uses. If another thread holds the lock, or held it in the process that this one was forked from,
// nobody waits: the caller allocates and frees.
class Kept {
 public:
  // Returns the smallest block that fits and is not larger than `most`. If there is none, it returns null and frees the
  // oldest blocks of as many bytes, so that kept blocks do not raise the peak memory of a process. Much larger blocks
  // stay: otherwise two layers of different sizes would free each other's blocks in every call.
  Block* take(size_t bytes, size_t most) {
    std::vector<Block*> dropped;
    Block* found = nullptr;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock.owns_lock()) return nullptr;
      auto best = blocks_.end();
      for (auto it = blocks_.begin(); it != blocks_.end(); ++it) {
        const bool fits = (*it)->bytes >= bytes && (*it)->bytes <= most;
        if (fits && (best == blocks_.end() || (*it)->bytes < (*best)->bytes)) best = it;
      }
      if (best != blocks_.end()) {
        found = *best;
        blocks_.erase(best);
        bytes_ -= found->bytes;
      } else {
        dropped = oldest(bytes, kMostTimes * bytes);
      }
    }
    free(dropped);
    return found;
  }

  // Keeps a block, and frees the oldest ones for it.
  void give(Block* block) {
    std::vector<Block*> dropped;
    {
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      if (!lock.owns_lock() || block->bytes > kScratchBytes) {
        dropped.push_back(block);
      } else {
        const size_t all = bytes_ + block->bytes;
        if (all > kScratchBytes) dropped = oldest(all - kScratchBytes, kScratchBytes);
        blocks_.push_back(block);
        bytes_ += block->bytes;
      }
    }
    free(dropped);
  }

  size_t release() {
    std::vector<Block*> dropped;
    size_t bytes = 0;
    {
      std::unique_lock<std::mutex> lock(mutex_, std::defer_lock);
      for (int i = 0; i < 1000 && !lock.try_lock(); ++i) std::this_thread::yield();
      if (!lock.owns_lock()) return 0;
      dropped.swap(blocks_);
      std::swap(bytes, bytes_);
    }
    free(dropped);
    return bytes;
  }

 private:
  // Removes and returns the oldest blocks of at most `most` bytes each, of so many bytes together, or all.
  std::vector<Block*> oldest(size_t bytes, size_t most) {
    std::vector<Block*> taken;
    size_t sum = 0;
    for (auto it = blocks_.begin(); it != blocks_.end() && sum < bytes;) {
      if ((*it)->bytes > most) {
        ++it;
        continue;
      }
      sum += (*it)->bytes;
      taken.push_back(*it);
      it = blocks_.erase(it);
    }
    bytes_ -= sum;
    return taken;
  }
  static void free(const std::vector<Block*>& blocks) {
    for (Block* const block : blocks) {
      std::free(block->data);
      delete block;
    }
  }

  std::mutex mutex_;
  std::vector<Block*> blocks_;  // oldest first
  size_t bytes_ = 0;
};

// Never destroyed: threads may outlive the static objects of the process.
Kept& kept() {
  static Kept& all = *new Kept;
  return all;
}

class ScratchAllocator final : public c10::Allocator {
 public:
  // `most_times`: how many times larger than its request a block may be.
  explicit ScratchAllocator(double most_times) : most_times_(most_times) {}

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = kept().take(bytes, static_cast<size_t>(most_times_ * static_cast<double>(bytes)) + kAlignment);
    if (!block) {
      const size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
      const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      void* data = nullptr;
      // In the words of torch's allocator, which programs that try batch sizes look for.
      TORCH_CHECK(posix_memalign(&data, alignment, rounded) == 0,
                  "DefaultCPUAllocator: can't allocate memory: you tried to allocate ", bytes, " bytes.");
      advise_huge_pages(data, rounded);
      block = new Block{data, rounded};
    }
    return {block->data, block, raw_deleter(), c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return [](void* block) { kept().give(static_cast<Block*>(block)); };
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  const double most_times_;
};

at::Tensor kept_empty(at::IntArrayRef sizes, const at::TensorOptions& options, ScratchAllocator& allocator) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  const size_t bytes = static_cast<size_t>(c10::multiply_integers(sizes)) * c10::elementSize(type);
  const at::Context& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (bytes < kLeastBytes || filled) return empty_on_cpu(sizes, options);
  return at::Tensor(
      at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt));
}

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

at::Tensor empty_on_cpu(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::Context& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory()) {
    return at::empty(sizes, options);
  }
  return at::Tensor(at::detail::empty_cpu(sizes, options));
}

size_t release_scratch() {
  const size_t bytes = kept().release();
#if defined(__GLIBC__)
  malloc_trim(0);  // free() alone keeps what is not at the end of the heap
#endif
  return bytes;
}

at::Tensor scratch_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static ScratchAllocator& allocator = *new ScratchAllocator(kMostTimes);
  return kept_empty(sizes, options, allocator);
}

at::Tensor gradient_empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  static ScratchAllocator& allocator = *new ScratchAllocator(1.125);
  return kept_empty(sizes, options, allocator);
}

}  // namespace lstm_ext
