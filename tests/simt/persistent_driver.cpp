// Runs the persistent kernels of every type on fenced memory and compares them with the stepwise kernels, as
// persistent_reference.h says. persistent_driver [forward|backward|faults|reuse|no-memset|large]; without a word, all
// of the first four. SIMT_... variables say how to emulate it. Ends with 0: right, 1: wrong, 2: simt::Error.
// BFLOAT_ONLY: bfloat16 alone, which compiles in a fraction of the time.
#include <deque>
#include <utility>

#include "cuda/persistent_bf16.cu"
#include "cuda/stepwise_bf16.cu"
#if !defined(BFLOAT_ONLY)
#include "cuda/persistent_f16.cu"
#include "cuda/persistent_f32.cu"
#include "cuda/stepwise_f16.cu"
#include "cuda/stepwise_f32.cu"
#endif
#include "simt/persistent_reference.h"

namespace {

using namespace persistent;
using lstm_ext::cuda::kPieceBytes;
using lstm_ext::cuda::PersistentSides;

// Of a wait, by the emulator's clock, which leaps when there is nothing left to wait for.
constexpr int64_t kLimit = int64_t{1} << 32;

template <typename T>
void start(const PersistentSides<lstm_ext::cuda::PersistentForward<T>>& all, Exchange exchange) {
  lstm_ext::cuda::persistent_forward(all, exchange, nullptr);
}
template <typename T>
void start(const PersistentSides<lstm_ext::cuda::PersistentBackward<T>>& all, Exchange exchange) {
  lstm_ext::cuda::persistent_backward(all, exchange, nullptr);
}

template <typename T>
const char* type_of(const Side<T>&) {
  return checks::name_of_type<T>();
}

// The launches of a pass, a chunk each, and what lies between them.
template <typename Pass>
class Launches {
 public:
  using D = typename Pass::Operand;
  using Results = typename Pass::Results;
  int lost_before = -1;  // the chunk of this number waits for what nobody writes
  int64_t limit = kLimit;

  Launches(const Case& s, Exchange exchange) : s_(s), exchange_(exchange) {
    constexpr int64_t kNumbers = kPieceBytes / sizeof(D), kGates = Pass::kBackward ? 4 : 1;
    length_ = (s.hidden + kNumbers - 1) / kNumbers * kNumbers * kGates;
    int64_t first = 0;
    for (const int64_t end : s.chunks) chunks_.emplace_back(std::exchange(first, end), end);
    chunks_.emplace_back(first, s.steps);
    if (Pass::kBackward) std::reverse(chunks_.begin(), chunks_.end());
    for (const auto& [begin, end] : chunks_) {
      for (int side = 0; side < s.sides; ++side) {
        slots_.emplace_back(mails() ? sequence(side).chunk_rows(begin, end) * length_ : s.batch * length_, "mailbox");
      }
      words_.emplace_back(lstm_ext::cuda::kControlWords, "control words");
    }
  }

  // `clears`: as the host has to.
  void run(const std::deque<Pass>& sides, const std::vector<std::unique_ptr<Results>>& results, bool clears = true) {
    status_[0] = 0;
    note_instance(sides[0]);
    for (size_t k = 0; k < chunks_.size(); ++k) {
      const auto [first, end] = chunks_[k];
      PersistentSides<typename Pass::Arguments> all{};
      all.count = s_.sides;
      all.groups = s_.groups;
      all.extra = extra();
      if (mails()) {
        set_all_bits(words_[k].data(), words_[k].size());
        all.control = {words_[k].data(), k > 0 ? words_[k - 1].data() : nullptr, status_.data(), limit};
      }
      for (int i = 0; i < s_.sides; ++i) {
        DeviceBuffer<D>& slots = slots_[k * s_.sides + i];
        if (mails() && clears) set_all_bits(slots.data(), slots.size());
        const Pass& side = sides[i];
        auto& args = all.sides[i];
        args = side.arguments(*results[i], first, end);
        args.steps = side.sequence.chunk(first, end, s_.batch);
        args.resets = s_.resets != Case::kNever ? side.resets.data() + side.sequence.chunk_row(first, end) : nullptr;
        args.weight = side.U.data.data();
        args.weight_stride = side.U.stride;
        // The last chunk hands on nothing: where blocks do not meet there may be no slots.
        const bool leaves = mails() || k + 1 < chunks_.size();
        args.mailbox = {leaves ? slots.data() : nullptr, k > 0 ? last_slot(side, k - 1, i) : nullptr, length_};
        if constexpr (Pass::kBackward) {
          if (side.in_mailbox(exchange_)) args.cell.grad_recurrent_part = nullptr;
        }
      }
      DeviceBuffer<D> lost(s_.batch * length_, "lost");
      set_all_bits(lost.data(), lost.size());
      if (lost_before == static_cast<int>(k)) all.sides[0].mailbox.before = lost.data();
      const uint64_t polls = simt::statistics().polls;
      start(all, exchange_);
      polls_ = simt::statistics().polls - polls;
      if (mails()) {
        const int64_t units = lstm_ext::cuda::persistent_shape(Pass::kBackward, exchange_, sizeof(D)).units;
        const int64_t blocks = (s_.hidden + units - 1) / units * s_.groups * s_.sides;
        expect(words_[k][lstm_ext::cuda::kBlocksThatCame] + 1 == blocks, "a block was not counted");
      }
      for (int i = 0; i < s_.sides; ++i) take_from_mailbox(sides[i], *results[i], k, i);
    }
    for (const auto& result : results) {
      Results::each(*result, *result, [](const auto& values, const auto&, const char*) { add_to_digest(values); });
    }
  }

  // That every operand is where it has to be.
  void check_operands(const std::deque<Pass>& sides, const std::vector<std::unique_ptr<Results>>& results) const {
    expect(status_[0] == 0, "a wait expired");
    for (size_t k = 0; k < chunks_.size(); ++k) {
      for (int i = 0; i < s_.sides; ++i) {
        for (int64_t n = chunks_[k].first; n < chunks_[k].second; ++n) {
          if (mails() || (n == last_step(k) && k + 1 < chunks_.size())) check_slot(sides[i], *results[i], k, i, n);
        }
      }
    }
  }

  const std::vector<std::pair<int64_t, int64_t>>& chunks() const { return chunks_; }
  bool gave_up() const { return status_[0] == 1; }
  uint64_t polls_of_last_launch() const { return polls_; }

 private:
  bool mails() const { return exchange_ == Exchange::kMailbox; }
  Sequence sequence(int side) const { return {s_, s_.first_reversed != (side == 1)}; }
  int64_t last_step(size_t k) const { return Pass::kBackward ? chunks_[k].first : chunks_[k].second - 1; }
  int extra() const {
    const auto shape = lstm_ext::cuda::persistent_shape(Pass::kBackward, exchange_, sizeof(D));
    const int64_t of_piece = shape.depth(sizeof(D)) / shape.pieces;
    const int64_t pieces = (length_ + of_piece - 1) / of_piece;
    return static_cast<int>(std::max<int64_t>(0, pieces - shape.pieces)) + s_.more_extra;
  }
  void note_instance(const Pass& side) const {
    checks::instances.insert(std::string(Pass::kBackward ? "backward " : "forward ") + type_of(side) +
                             (s_.has_options() ? " options " : " plain ") + (mails() ? "mailbox" : "none"));
  }
  // Where the operand of step n begins.
  D* slot(const Pass& side, size_t k, int i, int64_t n) {
    const auto [first, end] = chunks_[k];
    const int64_t row = mails() ? side.sequence.offset(n) - side.sequence.chunk_row(first, end) : 0;
    return slots_[k * s_.sides + i].data() + row * length_;
  }
  const D* last_slot(const Pass& side, size_t k, int i) { return slot(side, k, i, last_step(k)); }

  void take_from_mailbox(const Pass& side, const Results& result, size_t k, int i) {
    if constexpr (Pass::kBackward) {
      if (!side.in_mailbox(exchange_)) return;
      const auto [first, end] = chunks_[k];
      const DeviceBuffer<D>& slots = slots_[k * s_.sides + i];
      std::copy(slots.begin(), slots.end(), &result.dz[side.sequence.chunk_row(first, end) * length_]);
    } else {
      (void)side, (void)result, (void)k, (void)i;
    }
  }

  void check_slot(const Pass& side, const Results& result, size_t k, int i, int64_t n) const {
    const D* slot = const_cast<Launches*>(this)->slot(side, k, i, n);
    const int64_t gates = side.width() / s_.hidden, of_gate = length_ / gates;
    for (int64_t b = 0; b < side.sequence.rows_in(n); ++b) {
      for (int64_t at = 0; at < length_; ++at) {
        const int64_t j = at % of_gate;
        const double wanted = j < s_.hidden ? side.left(result, n, b, at / of_gate * s_.hidden + j) : 0;
        const double got = number(slot[b * length_ + at]);
        if (got == wanted || (std::isnan(got) && std::isnan(wanted))) continue;
        char text[128];
        std::snprintf(text, sizeof text, "operand of side %d, step %d, row %d, number %d: %.9g, expected %.9g", i,
                      static_cast<int>(n), static_cast<int>(b), static_cast<int>(at), got, wanted);
        return expect(false, text);
      }
    }
  }

  const Case s_;
  const Exchange exchange_;
  int64_t length_;
  std::vector<std::pair<int64_t, int64_t>> chunks_;  // in the order of the pass
  std::deque<DeviceBuffer<D>> slots_;                // of a chunk, a side
  std::deque<DeviceBuffer<uint32_t>> words_;
  DeviceBuffer<uint32_t> status_{1, 0u, "status"};
  uint64_t polls_ = 0;
};

template <typename Pass>
std::vector<std::unique_ptr<typename Pass::Results>> nothing_of(const std::deque<Pass>& sides) {
  std::vector<std::unique_ptr<typename Pass::Results>> results;
  for (const Pass& side : sides) results.emplace_back(new typename Pass::Results(side.nothing()));
  return results;
}

template <typename Pass>
void add_sides(std::deque<Pass>& sides, const Case& s) {
  for (int i = 0; i < s.sides; ++i) sides.emplace_back(s, s.first_reversed != (i == 1));
}

template <typename Pass>
void compare(const std::deque<Pass>& sides, const std::vector<std::unique_ptr<typename Pass::Results>>& got) {
  const auto expected = nothing_of(sides);
  for (size_t i = 0; i < sides.size(); ++i) {
    sides[i].reference(*got[i], *expected[i]);
    Pass::Results::each(*got[i], *expected[i],
                        [](const auto& a, const auto& b, const char* what) { expect_near(a, b, what); });
  }
}

template <typename Pass>
void expect_same_bits(const std::vector<std::unique_ptr<typename Pass::Results>>& a,
                      const std::vector<std::unique_ptr<typename Pass::Results>>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    Pass::Results::each(*a[i], *b[i], [](const auto& x, const auto& y, const char* what) {
      expect(same_bits(x, y), std::string(what) + " has other bits");
    });
  }
}

template <typename Pass>
std::string label_of(const Case& s, Exchange exchange) {
  return std::string(Pass::kBackward ? "backward " : "forward ") +
         (exchange == Exchange::kMailbox ? "mailbox " : "none ") + std::to_string(s.steps) + " steps of " +
         std::to_string(s.batch) + " rows of " + std::to_string(s.hidden) + (s.packed ? " packed" : "") +
         (s.has_options() ? " options" : "") + ", groups " + std::to_string(s.groups);
}

template <typename Pass>
void check(const Case& s, Exchange exchange) {
  if (checks::failures > 0) return;  // one wrong case is enough: waits that expire take their time
  label = label_of<Pass>(s, exchange);
  std::deque<Pass> sides;
  add_sides(sides, s);
  const auto got = nothing_of(sides);
  Launches<Pass> launches(s, exchange);
  launches.run(sides, got);
  launches.check_operands(sides, got);
  compare(sides, got);
  if (s.groups == 1 && s.more_extra == 0) return;
  Case plainly = s;
  plainly.groups = 1;
  plainly.more_extra = 0;
  const auto other = nothing_of(sides);
  Launches<Pass>(plainly, exchange).run(sides, other);
  expect_same_bits<Pass>(got, other);
}

template <typename Change>
Case with(Case s, Change&& change) {
  change(s);
  return s;
}

template <typename Pass>
void check_none() {
  const Case cases[] = {
      {2, 1, 8, {}},
      with({5, 9, 40, {2}}, [](Case& s) { s.resets = Case::kToState; }),
      with({5, 17, 100, {1, 3}}, [](Case& s) { s.packed = true, s.resets = Case::kToZeros; }),
      with(
          {5, 5, 40, {3}},
          [](Case& s) { s.lengths = s.mask = s.returned = true, s.zoneout = Case::kFlags, s.resets = Case::kToState; }),
      with({4, 5, 37, {1}},
           [](Case& s) {
             s.packed = s.mask = s.first_reversed = true, s.zoneout = Case::kShares, s.saves = false;
             s.resets = Case::kToState;
           }),
      with({1, 9, 128, {}}, [](Case& s) { s.batch_first = true, s.states = false, s.more_extra = 2, s.sides = 1; }),
      with({3, 9, 40, {}}, [](Case& s) { s.nan = s.batch_first = true, s.resets = Case::kToZeros; }),
      with({3, 2, 70, {}}, [](Case& s) { s.options = true, s.saves = false, s.sides = 1; }),
  };
  for (const Case& s : cases) check<Pass>(s, Exchange::kNone);
}

template <typename Pass>
void check_mailbox() {
  const Case cases[] = {
      {1, 1, 8, {}},
      with({5, 9, 40, {2}}, [](Case& s) { s.resets = Case::kToState; }),
      with({5, 17, 40, {1, 3}}, [](Case& s) { s.packed = true, s.resets = Case::kToZeros, s.groups = 2; }),
      with({2, 17, 130, {}}, [](Case& s) { s.groups = 2, s.sides = 1, s.saves = false; }),
      with(
          {5, 5, 40, {3}},
          [](Case& s) { s.lengths = s.mask = s.returned = true, s.zoneout = Case::kFlags, s.resets = Case::kToState; }),
      with({4, 5, 37, {1}},
           [](Case& s) {
             s.packed = s.mask = s.first_reversed = true, s.zoneout = Case::kShares, s.saves = false;
             s.resets = Case::kToState;
           }),
      with({2, 9, 100, {}}, [](Case& s) { s.batch_first = true, s.groups = 3, s.states = false, s.sides = 1; }),
      with({4, 9, 24, {}}, [](Case& s) { s.nan = s.own_parts = true, s.more_extra = 1, s.resets = Case::kToZeros; }),
      with({3, 25, 8, {1}}, [](Case& s) { s.options = true, s.groups = 2; }),
  };
  for (const Case& s : cases) check<Pass>(s, Exchange::kMailbox);
}

// Weights that have no room in registers.
template <typename Pass>
void check_large(int64_t hidden) {
  check<Pass>(with({2, 1, hidden, {}}, [](Case& s) { s.sides = 1; }), Exchange::kMailbox);
}

// A piece that never comes ends the launch, and those behind it; nobody takes what they leave for results.
template <typename Pass>
void check_faults() {
  const Case s = with({5, 9, 24, {2, 4}}, [](Case& c) { c.own_parts = true, c.zoneout = Case::kFlags; });
  label = label_of<Pass>(s, Exchange::kMailbox) + ", a piece is lost";
  std::deque<Pass> sides;
  add_sides(sides, s);
  const auto got = nothing_of(sides);
  Launches<Pass> launches(s, Exchange::kMailbox);
  launches.lost_before = 1;
  launches.limit = 1 << 20;
  launches.run(sides, got);
  expect(launches.gave_up(), "nobody said so");
  expect(launches.polls_of_last_launch() < 10000, "the launch behind it waited");
  for (size_t i = 0; i < sides.size(); ++i) {
    const auto spoiled = [&](int k) {
      const auto [first, end] = launches.chunks()[k];
      return sides[i].is_spoiled(*got[i], first, end);
    };
    expect(!spoiled(0), "the launch in front of it is spoiled");
    expect(spoiled(1), "its results are not spoiled");
    expect(spoiled(2), "the results of the launch behind it are not spoiled");
  }
}

// A block that waits for a piece of another one, which comes when that one has done something else for a while.
struct LateBlock {
  lstm_ext::cuda::PersistentControl control;
  unsigned char* slot;
  enum Late { kSends, kSendsNothing, kNeverComes } late;
  uint32_t* came;  // 1: the piece did
};
LSTM_DEVICE void do_something_else(const LateBlock& a, int times) {
  for (int i = 0; i < times; ++i) {
    lstm_ext::cuda::load_relaxed(a.control.words);
    atomicAdd(a.control.status, 0u);  // nobody takes it for a deadlock
  }
}
LSTM_KERNEL late_block_kernel(LateBlock a) {
  using namespace lstm_ext::cuda;
  if (blockIdx.x == 1) {
    if (threadIdx.x != 0 || a.late == LateBlock::kNeverComes) return;
    do_something_else(a, 8192);
    atomicAdd(a.control.words + kBlocksThatCame, 1u);
    do_something_else(a, 512);  // it reads its weights
    if (a.late == LateBlock::kSends) store_relaxed_16(a.slot, make_uint4(1, 2, 3, 4));
    return;
  }
  if (threadIdx.x == 0) atomicAdd(a.control.words + kBlocksThatCame, 1u);
  AwaitedPieces<1> piece(a.slot, 0, 1);
  const bool came = piece.wait<0, 1>(a.control, gridDim.x);
  if (threadIdx.x == 0) *a.came = came ? 1 : 0;
}
// The time of a wait begins when all blocks have come; that for them to come ends too.
void check_late_blocks() {
  if (simt::translated_kernel != nullptr) return;  // nvcc does not know the kernel above
  label = "a block that comes late";
  for (const auto late : {LateBlock::kSends, LateBlock::kSendsNothing, LateBlock::kNeverComes}) {
    DeviceBuffer<uint32_t> words(lstm_ext::cuda::kControlWords, "control words"), status(1, 0u, "status"),
        came(1, 7u, "came"), slot(4, "slot");
    set_all_bits(words.data(), words.size());
    set_all_bits(slot.data(), slot.size());
    lstm_ext::cuda::LaunchConfig config;
    config.grid = dim3(2);
    config.block = dim3(32);
    config.cooperative = true;
    // Switches between threads: more than the late block makes between coming and sending, fewer than before.
    constexpr int64_t kShort = 1 << 16;
    const LateBlock args{{words.data(), nullptr, status.data(), kShort},
                         reinterpret_cast<unsigned char*>(slot.data()),
                         late,
                         came.data()};
    lstm_ext::cuda::launch(late_block_kernel, config, args);
    const bool sends = late == LateBlock::kSends;
    expect(came[0] == (sends ? 1 : 0), sends ? "a wait expired before all blocks had come" : "a wait did not expire");
  }
}

template <typename Pass>
void check_reuse(bool clears) {
  const Case s = with({5, 9, 24, {3}}, [](Case& c) { c.resets = Case::kToZeros; });
  label = label_of<Pass>(s, Exchange::kMailbox) + ", used again";
  std::deque<Pass> some, others;
  add_sides(some, s);
  add_sides(others, s);
  Launches<Pass> launches(s, Exchange::kMailbox);
  const auto first = nothing_of(some), second = nothing_of(others), third = nothing_of(some);
  launches.run(some, first);
  launches.run(others, second, clears);
  launches.check_operands(others, second);
  compare(others, second);
  launches.run(some, third, clears);
  expect_same_bits<Pass>(first, third);
}

template <typename T>
void check_all(const std::string& part) {
  const bool all = part.empty();
  if (all || part == "forward") {
    check_none<Forward<T>>();
    check_mailbox<Forward<T>>();
  }
  if (all || part == "backward") {
    check_none<Backward<T>>();
    check_mailbox<Backward<T>>();
  }
  if (all || part == "faults") {
    check_late_blocks();
    check_faults<Forward<T>>();
    check_faults<Backward<T>>();
  }
  if (all || part == "reuse" || part == "no-memset") {
    check_reuse<Forward<T>>(part != "no-memset");
    check_reuse<Backward<T>>(part != "no-memset");
  }
  if (part != "large") return;
  check_large<Forward<T>>(1032);
  check_large<Backward<T>>(sizeof(typename Types<T>::Gradient) == 4 ? 520 : 1032);
}

}  // namespace

int main(int count, char** words) {
  const std::string part = count > 1 ? words[1] : "";
  try {
    check_all<__nv_bfloat16>(part);
#if !defined(BFLOAT_ONLY)
    check_all<__half>(part);
    check_all<float>(part);
#endif
  } catch (const simt::Error& error) {
    std::printf("%s: %s\n", label.c_str(), error.what());
    return 2;
  }
  for (const std::string& instance : checks::instances) std::printf("ran: %s\n", instance.c_str());
  std::printf("bits: %016llx\n", static_cast<unsigned long long>(digest));
  return checks::failures == 0 ? 0 : 1;
}
