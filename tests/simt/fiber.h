// Stacks and the switch between them. One operating-system thread, many stacks.
#pragma once

#include <cstddef>
#include <vector>

// SIMT_UCONTEXT is for testing what other processors use.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_OWN_SWITCH 1
#else
#define SIMT_OWN_SWITCH 0
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace simt {

struct Stack {
  char* base = nullptr;
  size_t bytes = 0;
};

// Stacks are handed out again, the last one first: threads that never wait all run on one warm stack.
class StackPool {
 public:
  ~StackPool();
  Stack take(size_t bytes);
  void give_back(const Stack& stack);

 private:
  void clear();
  std::vector<Stack> free_;
  std::vector<Stack> slabs_;
  size_t bytes_ = 0;
};

// Where a stack was left.
struct Context {
#if SIMT_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  // For ASan, which has to be told about every change of stacks.
  Stack stack;
  void* fake_stack = nullptr;
};

// Makes `context` start in `entry`, which must never return, on `stack`.
void prepare(Context& context, const Stack& stack, void (*entry)());
// Goes on in `to`; comes back when something switches to `from`.
void switch_context(Context& from, Context& to, bool from_ends = false);
// To be called first in an entry function: `from` is where it was switched from.
void arrived_on_new_stack(Context& from);

}  // namespace simt
