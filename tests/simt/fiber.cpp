#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

#if SIMT_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#if SIMT_ASAN
// A launch that fails leaves its threads where they are, and what they own with them.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }
#endif

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStacksPerSlab = 256;
// Every guard page is a mapping of its own, and a process has 65,530 of them.
constexpr size_t kGuardedSlabs = 32;

#if SIMT_OWN_SWITCH
// Saves what the calling convention says a call preserves, and nothing else.
__attribute__((naked, noinline)) void exchange_stacks(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
constexpr size_t kSavedRegisters = 6;
#endif

}  // namespace

StackPool::~StackPool() { clear(); }

void StackPool::clear() {
  for (const Stack& slab : slabs_) munmap(slab.base, slab.bytes);
  slabs_.clear();
  free_.clear();
}

Stack StackPool::take(size_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (bytes != bytes_) {
    clear();
    bytes_ = bytes;
  }
  if (free_.empty()) {
    // The lowest page of each stack is a guard. Pages that no thread touches cost nothing.
    const size_t slab_bytes = (bytes + kPage) * kStacksPerSlab;
    void* slab = mmap(nullptr, slab_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    slabs_.push_back({static_cast<char*>(slab), slab_bytes});
    for (size_t i = kStacksPerSlab; i-- > 0;) {
      char* guard = static_cast<char*>(slab) + i * (bytes + kPage);
      if (slabs_.size() <= kGuardedSlabs) mprotect(guard, kPage, PROT_NONE);
      free_.push_back({guard + kPage, bytes});
    }
  }
  Stack stack = free_.back();
  free_.pop_back();
  // A thread that a failed launch left behind has its variables' red zones still marked.
  ASAN_UNPOISON_MEMORY_REGION(stack.base, stack.bytes);
  return stack;
}

void StackPool::give_back(const Stack& stack) { free_.push_back(stack); }

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  context.stack = stack;
  context.fake_stack = nullptr;
#if SIMT_OWN_SWITCH
  // As if `entry` had been called from address 0: 16-byte aligned before the return address was pushed.
  void** top = reinterpret_cast<void**>(stack.base + stack.bytes - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  top -= kSavedRegisters;
  std::memset(top, 0, kSavedRegisters * sizeof(void*));
  context.stack_pointer = top;
#else
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.base;
  context.registers.uc_stack.ss_size = stack.bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#endif
}

void switch_context(Context& from, Context& to, bool from_ends) {
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &from.fake_stack, to.stack.base, to.stack.bytes);
#else
  (void)from_ends;
#endif
#if SIMT_OWN_SWITCH
  exchange_stacks(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.registers, &to.registers);
#endif
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrived_on_new_stack(Context& from) {
#if SIMT_ASAN
  const void* base = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &base, &from.stack.bytes);
  from.stack.base = static_cast<char*>(const_cast<void*>(base));
#else
  (void)from;
#endif
}

}  // namespace simt
