// Relaxed stores that not everybody sees yet, in the modes that have them (options().stores): what the PTX memory model
// allows, and a run on one CPU thread would not show.
//
// Memory itself always holds the newest of everything: so plain accesses, and writes that read what they change, need
// nothing of this. Kept here are the stores that some block does not see yet, with what it finds instead. A thread sees
// its own stores, others of its block do after a barrier. One place is coherent: nobody goes back to an older value.
// A fence shows to all whatever its thread sees, its own stores and those of others (causality).
#pragma once

#include <cstddef>

namespace simt {

struct Thread;

namespace weak {

void load(const Thread& thread, void* value, const void* address, unsigned bytes);
// Where they may be torn, `part` bytes are seen at once, else all.
void store(Thread& thread, void* address, const void* value, unsigned bytes, unsigned part);
// All see the newest that is there. Before a write that is not delayed.
void settle(const void* address, unsigned bytes);
// A fence of this thread.
void publish(const Thread& thread);
// A barrier of threads of one block.
void meet(Thread* const* threads, size_t count);

bool pending();
void reveal_some();
void forget();

}  // namespace weak
}  // namespace simt
