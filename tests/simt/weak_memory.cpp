#include "simt/weak_memory.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "simt/machine.h"

namespace simt::weak {
namespace {

constexpr unsigned kWord = sizeof(uint32_t);

// What becomes visible at once.
struct Store {
  const Thread* writer;
  std::vector<bool> seen;  // by block
  unsigned unseen;         // blocks left
  std::vector<const char*> words;
};

struct Version {
  uint32_t value;
  Store* store;
};

// A word in memory of which some block sees an older value than others.
struct Word {
  uint32_t before;                // what is seen by who sees none of the versions
  std::vector<Version> versions;  // from the oldest to the newest
};

std::vector<std::unique_ptr<Store>> stores;
std::unordered_map<const char*, Word> words;

uint32_t in_memory(const char* word) {
  uint32_t value;
  std::memcpy(&value, word, kWord);
  return value;
}

bool sees(const Thread& thread, const Store& store) {
  return store.writer == &thread || store.seen[thread.block->number];
}

// All see it: what was there before is past.
void complete(size_t index) {
  const std::unique_ptr<Store> done = std::move(stores[index]);
  stores[index] = std::move(stores.back());
  stores.pop_back();
  for (const char* place : done->words) {
    const auto found = words.find(place);
    if (found == words.end()) continue;
    auto& versions = found->second.versions;
    const auto own =
        std::find_if(versions.begin(), versions.end(), [&](const Version& v) { return v.store == done.get(); });
    if (own == versions.end()) continue;  // something newer is seen by all
    found->second.before = own->value;
    versions.erase(versions.begin(), own + 1);
    if (versions.empty()) words.erase(found);
  }
}

// Whether it was the last one.
bool reveal(Store& store, unsigned block) {
  if (store.seen[block]) return false;
  store.seen[block] = true;
  return --store.unseen == 0;
}

void complete(const Store* store) {
  const auto found =
      std::find_if(stores.begin(), stores.end(), [&](const auto& other) { return other.get() == store; });
  complete(static_cast<size_t>(found - stores.begin()));
}

void begin_store(const Thread& thread, char* address, const char* value, unsigned bytes) {
  stores.push_back(std::make_unique<Store>());
  Store& store = *stores.back();
  store.writer = &thread;
  store.unseen = static_cast<unsigned>(machine.blocks.size());
  store.seen.resize(store.unseen);
  for (unsigned at = 0; at < bytes; at += kWord) {
    char* place = address + at;
    const uint32_t there = in_memory(place);
    Word& word = words.try_emplace(place, Word{there, {}}).first->second;
    if (!word.versions.empty() && word.versions.back().value != there) {
      word = Word{there, {}};  // a plain store has come between, which all see
    }
    word.versions.push_back({in_memory(value + at), &store});
    store.words.push_back(place);
    std::memcpy(place, value + at, kWord);
  }
}

}  // namespace

void load(const Thread& thread, void* value, const void* address, unsigned bytes) {
  std::memcpy(value, address, bytes);
  if (words.empty() || bytes % kWord != 0) return;
  for (unsigned at = 0; at < bytes; at += kWord) {
    const char* place = static_cast<const char*>(address) + at;
    const auto found = words.find(place);
    if (found == words.end()) continue;
    const auto& versions = found->second.versions;
    if (versions.back().value != in_memory(place)) continue;  // a plain store has come after
    const auto newest =
        std::find_if(versions.rbegin(), versions.rend(), [&](const Version& v) { return sees(thread, *v.store); });
    if (newest == versions.rbegin()) continue;
    const uint32_t seen = newest == versions.rend() ? found->second.before : newest->value;
    std::memcpy(static_cast<char*>(value) + at, &seen, kWord);
  }
}

void store(Thread& thread, void* address, const void* value, unsigned bytes, unsigned part) {
  if (options().stores == Delivery::Now || bytes % kWord != 0 || block_of(address) != nullptr) {
    settle(address, bytes);
    std::memcpy(address, value, bytes);
    return;
  }
  const unsigned at_once = options().torn ? std::max(part, kWord) : bytes;
  for (unsigned at = 0; at < bytes; at += at_once) {
    begin_store(thread, static_cast<char*>(address) + at, static_cast<const char*>(value) + at, at_once);
  }
}

void settle(const void* address, unsigned bytes) {
  if (words.empty()) return;
  const auto* end = static_cast<const char*>(address) + bytes;
  const char* place = end - bytes;
  for (place -= reinterpret_cast<uintptr_t>(place) % kWord; place < end; place += kWord) {
    for (auto found = words.find(place); found != words.end(); found = words.find(place)) {
      complete(found->second.versions.back().store);
    }
  }
}

void publish(const Thread& thread) {
  for (size_t i = stores.size(); i-- > 0;) {
    if (sees(thread, *stores[i])) complete(i);
  }
}

void meet(Thread* const* threads, size_t count) {
  const Block& block = *threads[0]->block;
  const auto is_there = [&](const Thread* writer) {
    return count == block.size || std::find(threads, threads + count, writer) != threads + count;
  };
  for (size_t i = stores.size(); i-- > 0;) {
    Store& store = *stores[i];
    if (store.writer->block == &block && is_there(store.writer) && reveal(store, block.number)) complete(i);
  }
}

bool pending() { return !stores.empty(); }

// To some block each. Where they are late this happens when all wait, for many at a time.
void reveal_some() {
  const size_t count = options().stores == Delivery::Late ? machine.random() % stores.size() + 1 : 1;
  for (size_t i = 0; i < count && !stores.empty(); ++i) {
    const size_t index = machine.random() % stores.size();
    Store& store = *stores[index];
    unsigned block = static_cast<unsigned>(machine.random() % store.seen.size());
    while (store.seen[block]) block = (block + 1) % static_cast<unsigned>(store.seen.size());
    if (reveal(store, block)) complete(index);
  }
  note_progress();
}

void forget() {
  stores.clear();
  words.clear();
}

}  // namespace simt::weak
