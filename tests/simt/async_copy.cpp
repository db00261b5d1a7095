// cp.async: copies that take effect some time between being issued and being waited for.
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

constexpr unsigned kBytes = 16;  // in a copy

void carry_out(AsyncCopy& copy) {
  if (copy.done) return;
  copy.done = true;
  std::memcpy(copy.shared, copy.global, copy.source_bytes);
  std::memset(copy.shared + copy.source_bytes, 0, kBytes - copy.source_bytes);
}

void carry_out_some() {
  Thread& thread = *current;
  const auto some_of = [](std::vector<AsyncCopy>& group) {
    for (AsyncCopy& copy : group) {
      if (draw(4)) carry_out(copy);
    }
  };
  for (auto& group : thread.groups) some_of(group);
  some_of(thread.open_group);
}

void finish(std::vector<AsyncCopy>& group) {
  for (AsyncCopy& copy : group) {
    carry_out(copy);
    race::asynchronous_write_done(*current, copy.shared, kBytes);
  }
}

}  // namespace

void cp_async16(void* shared, const void* global, unsigned source_bytes, const char* file, int line) {
  note_position("cp.async", file, line);
  if (source_bytes > kBytes) fail("cp.async: more bytes to read than to write", file, line);
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % kBytes != 0) {
    fail("cp.async: an address is not aligned to the bytes copied", file, line);
  }
  if (block_of(shared) != current->block)
    fail("cp.async: the destination is not in this block's shared memory", file, line);
  if (block_of(global) != nullptr) fail("cp.async: the source is in shared memory", file, line);
  if (source_bytes > 0 && waits_for_launch(*current, global, /*writes=*/false)) {
    fail("cp.async reads what the launch in front of this one may still write: grid_dependency_wait comes later", file,
         line);
  }
  if (source_bytes > 0) race::access(*current, global, source_bytes, /*writes=*/false, file, line);
  race::asynchronous_write(*current, shared, kBytes, file, line);
  current->open_group.push_back({static_cast<char*>(shared), static_cast<const char*>(global), source_bytes, false});
  if (options().copies == Delivery::Now) carry_out(current->open_group.back());
  if (options().copies == Delivery::Mixed) carry_out_some();
}

void cp_async_commit(const char* file, int line) {
  note_position("cp.async.commit_group", file, line);
  current->groups.push_back(std::move(current->open_group));
  current->open_group.clear();
}

void cp_async_wait(unsigned groups_left, const char* file, int line) {
  note_position("cp.async.wait_group", file, line);
  auto& groups = current->groups;
  if (groups.size() <= groups_left) return;
  const size_t finished = groups.size() - groups_left;
  for (size_t i = 0; i < finished; ++i) finish(groups[i]);
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(finished));
}

}  // namespace simt
