// What g++ -fsanitize=thread calls at every access to memory, and how an address in the program becomes a line.
//
// The program is linked without libtsan, so these functions are its. Always linked; only instrumented code calls them.
#include <dlfcn.h>
#include <elf.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <vector>

#include "simt/machine.h"
#include "simt/race_site.h"

namespace simt::race {
namespace {

std::vector<std::pair<const char*, int>> known_lines;
std::map<std::pair<const char*, int>, Site> sites;

// The detector's own containers may share template instances with instrumented code.
bool inside = false;

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string line_of_address(uintptr_t address) {
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(address), &info) == 0) return "?";
  const auto* header = static_cast<const Elf64_Ehdr*>(info.dli_fbase);
  const uintptr_t base = header->e_type == ET_DYN ? reinterpret_cast<uintptr_t>(info.dli_fbase) : 0;
  char command[4200];
  // One less: the address is where the hook returns to, perhaps on the next line already.
  std::snprintf(command, sizeof command, "addr2line -C -i -e '%s' 0x%lx 2>/dev/null", info.dli_fname,
                static_cast<unsigned long>(address - 1 - base));
  std::string line = "?";
  if (FILE* output = popen(command, "r")) {
    char text[1024];
    if (std::fgets(text, sizeof text, output) != nullptr) {
      text[std::strcspn(text, "\n ")] = 0;  // without "(discriminator 2)"
      line = base_name(text);
    }
    pclose(output);
  }
  return line;
}

}  // namespace

Site site_of(const char* file, int line) {
  const auto [found, added] = sites.emplace(std::make_pair(file, line), kFileAndLine | known_lines.size());
  if (added) known_lines.push_back({file, line});
  return found->second;
}

std::string describe(Site site) {
  site &= ~kAtomic;
  if ((site & kFileAndLine) == 0) return line_of_address(site);
  const auto& [file, line] = known_lines[site & ~kFileAndLine];
  return line == 0 ? file : base_name(file) + ":" + std::to_string(line);
}

void hook(const void* address, size_t bytes, bool writes, const void* program_counter) {
  if (current == nullptr || inside) return;
  // Most accesses are to the thread's own variables.
  const Stack& stack = current->context.stack;
  if (static_cast<const char*>(address) - stack.base >= 0 &&
      static_cast<size_t>(static_cast<const char*>(address) - stack.base) < stack.bytes) {
    return;
  }
  inside = true;
  check_access(current->id, address, bytes, writes, reinterpret_cast<Site>(program_counter), /*asynchronous=*/false);
  inside = false;
}

}  // namespace simt::race

#define SIMT_HOOK(name, bytes, writes) \
  void name(void* address) { simt::race::hook(address, bytes, writes, __builtin_return_address(0)); }
#define SIMT_HOOKS(bytes)                               \
  SIMT_HOOK(__tsan_read##bytes, bytes, false)           \
  SIMT_HOOK(__tsan_write##bytes, bytes, true)           \
  SIMT_HOOK(__tsan_unaligned_read##bytes, bytes, false) \
  SIMT_HOOK(__tsan_unaligned_write##bytes, bytes, true) \
  SIMT_HOOK(__tsan_volatile_read##bytes, bytes, false)  \
  SIMT_HOOK(__tsan_volatile_write##bytes, bytes, true)

// A driver's host code may use atomics (shared_ptr does); they are no part of a kernel.
#define SIMT_ATOMIC(bits)                                                                                              \
  int##bits##_t __tsan_atomic##bits##_load(const volatile int##bits##_t* a, int) {                                     \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                                       \
  }                                                                                                                    \
  void __tsan_atomic##bits##_store(volatile int##bits##_t* a, int##bits##_t v, int) {                                  \
    __atomic_store_n(a, v, __ATOMIC_SEQ_CST);                                                                          \
  }                                                                                                                    \
  int##bits##_t __tsan_atomic##bits##_exchange(volatile int##bits##_t* a, int##bits##_t v, int) {                      \
    return __atomic_exchange_n(a, v, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                    \
  int##bits##_t __tsan_atomic##bits##_fetch_add(volatile int##bits##_t* a, int##bits##_t v, int) {                     \
    return __atomic_fetch_add(a, v, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  int##bits##_t __tsan_atomic##bits##_fetch_sub(volatile int##bits##_t* a, int##bits##_t v, int) {                     \
    return __atomic_fetch_sub(a, v, __ATOMIC_SEQ_CST);                                                                 \
  }                                                                                                                    \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile int##bits##_t* a, int##bits##_t* e, int##bits##_t v, int, \
                                                    int) {                                                             \
    return __atomic_compare_exchange_n(a, e, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                            \
  }                                                                                                                    \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile int##bits##_t* a, int##bits##_t* e, int##bits##_t v, int,   \
                                                  int) {                                                               \
    return __atomic_compare_exchange_n(a, e, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                             \
  }

extern "C" {
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_ATOMIC(8)
SIMT_ATOMIC(16)
SIMT_ATOMIC(32)
SIMT_ATOMIC(64)

void __tsan_read_range(void* address, size_t bytes) {
  simt::race::hook(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  simt::race::hook(address, bytes, true, __builtin_return_address(0));
}
// Called before main for every instrumented object file: this is how the detector knows that it has something to do.
void __tsan_init() { simt::race::enabled = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
