// The register tile: R batch rows x NV registers of columns, and the loops over k that fill it.
//
// In the forward pass the NV = 4 registers of a row are the four gates of the same units (the panels are
// gate-interleaved), so a cell update needs nothing but the tile. Everywhere else they are neighbouring output columns.
#pragma once

#include "cpu/isa.h"

#include "cpu/range.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The rows of a tile: accumulators, the NV weights of a step and a broadcast value must fit into the registers.
constexpr int kTileRows = kVectorRegisters == 32 ? 6 : 3;

// The prefetch distance of a tile of one row in its panel, if it prefetches (kernels.h). It reads so fast that most
// hardware prefetchers are late at each new page of a weight that is no longer in the caches.
constexpr int64_t kPrefetchBytes = 4096;

// Panel block of the k loop: kBlockK x 4 registers stay in the second-level cache while the row tiles use them.
constexpr int64_t kBlockK = 512;

template <typename T, int R, int NV>
struct Tile {
  Reg<T> acc[R][NV];

  LSTM_EXT_INLINE void zero() {
#pragma GCC unroll kTileRows
    for (int r = 0; r < R; ++r)
#pragma GCC unroll kTileColumns
      for (int v = 0; v < NV; ++v) acc[r][v] = Simd<T>::zero();
  }
};

// bfloat16 panels interleave the numbers of two registers. load_pair reads both, half_of extracts one of them.
LSTM_EXT_INLINE Reg<float> load_pair(const uint16_t* b, int v) {
  return Simd<float>::load(reinterpret_cast<const float*>(b + v / 2 * 2 * Simd<float>::kLanes));
}
LSTM_EXT_INLINE Reg<float> half_of(Reg<float> pair, bool second) {
  using Index = Simd<float>::Index;
  const Index bits = reinterpret_cast<Index>(pair);
  return reinterpret_cast<Reg<float>>(second ? bits & -0x10000 : bits << 16);
}

// Register v of NV.
template <typename T, bool Partial, typename B>
LSTM_EXT_INLINE Reg<T> load_columns(const B* b, int v, int registers, int last) {
  if constexpr (std::is_same_v<B, uint16_t>)
    return half_of(load_pair(b, v), v % 2 != 0);
  else {
    const B* const at = b + v * Simd<T>::kLanes;
    if constexpr (Partial) {
      if (v == registers - 1) return Simd<T>::load_partial(at, last);
    }
    return Simd<T>::load(at);
  }
}

// Loads all NV registers. A bfloat16 pair is read once.
template <typename T, int NV, bool Partial, typename B>
LSTM_EXT_INLINE void load_all_columns(Reg<T> (&w)[NV], const B* b, int last) {
  if constexpr (std::is_same_v<B, uint16_t>) {
    static_assert(NV % 2 == 0);
#pragma GCC unroll kTileColumns
    for (int v = 0; v < NV; v += 2) {
      Reg<T> pair = load_pair(b, v);
      keep_in_register(pair);
      w[v] = half_of(pair, false);
      w[v + 1] = half_of(pair, true);
    }
  } else {
#pragma GCC unroll kTileColumns
    for (int v = 0; v < NV; ++v) w[v] = load_columns<T, Partial>(b, v, NV, last);
  }
}

// One step of k: acc[r][v] += a(r) * b[v]. b is NV registers of T or of narrower numbers, a(r) is one number. The last
// register has `last` valid lanes; if Partial, the rest of it must not be read.
template <typename T, int R, int NV, bool Partial, typename A, typename B>
LSTM_EXT_INLINE void multiply_add(Tile<T, R, NV>& tile, const A& a, const B* b, int last) {
  using S = Simd<T>;
  // With one row of bfloat16, 16 registers have room for all weights too.
  if constexpr (kVectorRegisters == 32 || (R == 1 && std::is_same_v<B, uint16_t>)) {
    Reg<T> w[NV];
    load_all_columns<T, NV, Partial>(w, b, last);
#pragma GCC unroll kTileColumns
    for (int v = 0; v < NV; ++v) {
      if constexpr (R > 1) keep_in_register(w[v]);
    }
#pragma GCC unroll kTileRows
    for (int r = 0; r < R; ++r) {
      const Reg<T> x = S::set1(a(r));
#pragma GCC unroll kTileColumns
      for (int v = 0; v < NV; ++v) tile.acc[r][v] = S::fma(x, w[v], tile.acc[r][v]);
    }
  } else {  // 12 accumulators, 3 broadcasts and one weight at a time fill 16 registers
    Reg<T> x[R];
#pragma GCC unroll kTileRows
    for (int r = 0; r < R; ++r) x[r] = S::set1(a(r));
#pragma GCC unroll kTileColumns
    for (int v = 0; v < NV; ++v) {
      Reg<T> w = load_columns<T, Partial>(b, v, NV, last);
      if constexpr (R == 2) keep_in_register(w);
#pragma GCC unroll kTileRows
      for (int r = 0; r < R; ++r) tile.acc[r][v] = S::fma(x[r], w, tile.acc[r][v]);
    }
  }
}

// The panel that is read after the present one. Tiles of the present panel prefetch it into the second-level cache, one
// line in each step of k: otherwise its first tile would wait for the third-level cache. Only with 32 registers, when a
// loop has one left for the address.
class NextPanel {
 public:
  static constexpr bool kUsed = kVectorRegisters == 32;

  // `here` is the present panel, which stands in if there is no next one.
  LSTM_EXT_INLINE NextPanel(const void* next, int64_t bytes, const void* here)
      : at_(static_cast<const char*>(next)), end_(at_ + bytes), here_(static_cast<const char*>(here)) {}
  // The address from which a tile of so many steps prefetches.
  LSTM_EXT_INLINE const char* take(int64_t steps) {
    if (at_ >= end_) return here_;
    const char* const begin = at_;
    at_ += steps * kLine;
    return begin;
  }
  static constexpr int64_t kLine = 64;

 private:
  const char *at_, *const end_, *const here_;
};

// Called before and after a loop: it keeps values that live across both out of these registers, so that the loop can
// use them. In functions as long as those that inline tiles, GCC 12 with 16 vector registers otherwise keeps the loop's
// own counter and pointers in memory. With 32 registers its loops are clean.
LSTM_EXT_INLINE void free_registers() {
  if constexpr (kVectorRegisters == 16) asm volatile("" ::: "rbx", "r12", "r13", "r14", "r15");
}

// The target of a loop's prefetches over k, a cache line in each step: nothing, data read later, or data written soon.
enum class Fetch { kNothing, kRead, kWrite };

// See accumulate_rows.
template <typename T, int R, int NV, bool Partial, Fetch kFetch, typename B>
LSTM_EXT_INLINE void accumulate_here(Tile<T, R, NV>& tile, const T* const (&a)[R], const B* b, int64_t b_step,
                                     int64_t count, int last, const char* fetched, int64_t fetch_step) {
  Tile<T, R, NV> local = tile;  // a tile whose address is known elsewhere would be stored in every step
  [[maybe_unused]] const bool fetches = R == 1 && fetches_panels;
  free_registers();
  const T* row[R];
#pragma GCC unroll kTileRows
  for (int r = 0; r < R; ++r) {
    row[r] = a[r];
    if constexpr (kVectorRegisters == 16) asm("" : "+r"(row[r]));  // forces a copy in a register
  }
  for (int64_t k = 0; k < count; ++k, b += b_step) {
    if constexpr (R == 1) {
      constexpr int64_t kBytes = NV * Simd<T>::kLanes * static_cast<int64_t>(sizeof(B));
#pragma GCC unroll 4
      for (int64_t line = 0; fetches && line < kBytes; line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(b + kPrefetchBytes / kBytes * b_step) + line);
    }
    if constexpr (kFetch != Fetch::kNothing) {
      if constexpr (kFetch == Fetch::kRead) __builtin_prefetch(fetched, 0, 2);
      if constexpr (kFetch == Fetch::kWrite) __builtin_prefetch(fetched, 1);
      fetched += fetch_step;
    }
    multiply_add<T, R, NV, Partial>(local, [&](int r) LSTM_EXT_LAMBDA_INLINE { return row[r][k]; }, b, last);
  }
  free_registers();
  tile = local;
}

template <typename T, int R, int NV, bool Partial, Fetch kFetch, typename B>
__attribute__((noinline)) void accumulate_apart(Tile<T, R, NV>& tile, const T* const (&a)[R], const B* b,
                                                int64_t b_step, int64_t count, int last, const char* fetched,
                                                int64_t fetch_step) {
  accumulate_here<T, R, NV, Partial, kFetch>(tile, a, b, b_step, count, last, fetched, fetch_step);
}

// acc[r][:] += sum_k a[r][k] * b[k * b_step + :]. Prefetches lines from `fetched` on, with a stride of `fetch_step`
// bytes. With narrower numbers this is a function call: their conversions need registers, and in long functions GCC
// kept sums in memory. With 32 registers and several rows it does not, and a call would cost more than it gains.
template <typename T, int R, int NV, bool Partial = false, Fetch kFetch = Fetch::kNothing, typename B>
LSTM_EXT_INLINE void accumulate_rows(Tile<T, R, NV>& tile, const T* const (&a)[R], const B* b, int64_t b_step,
                                     int64_t count, int last = 0, const char* fetched = nullptr,
                                     int64_t fetch_step = NextPanel::kLine) {
  if constexpr (std::is_same_v<T, B> || (kVectorRegisters == 32 && R > 1)) {
    accumulate_here<T, R, NV, Partial, kFetch>(tile, a, b, b_step, count, last, fetched, fetch_step);
  } else {
    accumulate_apart<T, R, NV, Partial, kFetch>(tile, a, b, b_step, count, last, fetched, fetch_step);
  }
}

// Whether two panels of `count` k are multiplied at once with one row. The sums of a single panel leave the multipliers
// idle, because each waits for its own previous value. With 32 registers and weights of T this matters only if the
// panels are in the first-level cache. From the second-level cache, one panel after the other is faster. A register of
// several parts has enough sums in one panel.
template <typename T, typename B>
LSTM_EXT_INLINE bool joins_panels(int64_t count) {
  if constexpr (kVectorRegisters < 16) return false;
  return kVectorRegisters == 16 || !std::is_same_v<T, B> || count <= 96;
}

// acc[n][:] += sum_k a[k] * panels[n][k * kPanel + :]; the sums are the same as one after the other. The prefetch
// distance in each panel is half of that for one panel.
template <typename T, int NV, typename B>
LSTM_EXT_INLINE void accumulate_panels_here(Tile<T, 2, NV>& tile, const T* a, const B* const (&panels)[2],
                                            int64_t count) {
  constexpr int64_t kPanel = NV * Simd<T>::kLanes;
  constexpr int64_t kBytes = kPanel * static_cast<int64_t>(sizeof(B));
  Tile<T, 2, NV> local = tile;
  const bool fetches = fetches_panels;
  free_registers();
  const B *first = panels[0], *second = panels[1];
  for (int64_t k = 0; k < count; ++k, first += kPanel, second += kPanel) {
#pragma GCC unroll 4
    for (int64_t line = 0; fetches && line < kBytes; line += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(first) + kPrefetchBytes / 2 + line);
      __builtin_prefetch(reinterpret_cast<const char*>(second) + kPrefetchBytes / 2 + line);
    }
    const Reg<T> x = Simd<T>::set1(a[k]);
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      Reg<T> w[NV];
      load_all_columns<T, NV, false>(w, n == 0 ? first : second, 0);
#pragma GCC unroll kTileColumns
      for (int v = 0; v < NV; ++v) local.acc[n][v] = Simd<T>::fma(x, w[v], local.acc[n][v]);
    }
  }
  free_registers();
  tile = local;
}
template <typename T, int NV, typename B>
__attribute__((noinline)) void accumulate_panels_apart(Tile<T, 2, NV>& tile, const T* a, const B* const (&panels)[2],
                                                       int64_t count) {
  accumulate_panels_here<T, NV>(tile, a, panels, count);
}
template <typename T, int NV, typename B>
LSTM_EXT_INLINE void accumulate_panels(Tile<T, 2, NV>& tile, const T* a, const B* const (&panels)[2], int64_t count) {
  if constexpr (std::is_same_v<T, B>) {
    accumulate_panels_here<T, NV>(tile, a, panels, count);
  } else {
    accumulate_panels_apart<T, NV>(tile, a, panels, count);
  }
}

// acc[r][:] += sum_k a[k * a_step + r] * b[k * b_step + :]
template <typename T, int R, int NV>
LSTM_EXT_INLINE void accumulate_columns(Tile<T, R, NV>& tile, const T* a, int64_t a_step, const T* b, int64_t b_step,
                                        int64_t count) {
  Tile<T, R, NV> local = tile;
  for (int64_t k = 0; k < count; ++k, a += a_step, b += b_step) {
    multiply_add<T, R, NV, false>(local, [&](int r) LSTM_EXT_LAMBDA_INLINE { return a[r]; }, b, 0);
  }
  tile = local;
}

// Calls f(first_row, std::integral_constant<int, R>) for tiles of nearly equal height that cover `rows` rows: 13 rows
// are 5 + 4 + 4, not 6 + 6 + 1, because a low tile loads as many weights as a high one. `low` prefers tiles of four
// rows, unless a single row would be left. f is compiled once for each height; if it is long, the copies in use should
// fit the first-level cache.
template <int R, typename F>
LSTM_EXT_INLINE void call_with_rows(int64_t first, int64_t rows, F&& f) {
  if constexpr (R == 1) {
    f(first, std::integral_constant<int, 1>{});
  } else if (rows == R) {
    f(first, std::integral_constant<int, R>{});
  } else {
    call_with_rows<R - 1>(first, rows, f);
  }
}

template <typename F>
LSTM_EXT_INLINE void for_each_row_tile(int64_t rows, F&& f, bool low = false) {
  int64_t tiles = divide_up(rows, kTileRows);
  if (kTileRows > 4 && low && rows > kTileRows) tiles = (rows + 2) / 4;
  for (int64_t i = 0; i < tiles; ++i) {
    const Range part = share(rows, tiles, i);
    call_with_rows<kTileRows>(part.begin, part.end - part.begin, f);
  }
}

// The same for columns: blocks of at most kTileColumns registers, nearly equal, over [begin, end);
// f(first_column, std::integral_constant<int, NV>, lanes of the last register).
template <int NV, typename F>
LSTM_EXT_INLINE void call_with_columns(int64_t first, int64_t registers, int last, F&& f) {
  if constexpr (NV == 1) {
    f(first, std::integral_constant<int, 1>{}, last);
  } else if (registers == NV) {
    f(first, std::integral_constant<int, NV>{}, last);
  } else {
    call_with_columns<NV - 1>(first, registers, last, f);
  }
}

template <typename T, typename F>
LSTM_EXT_INLINE void for_each_column_block(int64_t begin, int64_t end, F&& f) {
  constexpr int64_t lanes = Simd<T>::kLanes;
  const int64_t registers = divide_up(end - begin, lanes);
  const int64_t blocks = divide_up(registers, kTileColumns);
  for (int64_t i = 0; i < blocks; ++i) {
    const Range part = share(registers, blocks, i);
    const int64_t left = end - begin - (part.end - 1) * lanes;
    call_with_columns<kTileColumns>(begin + part.begin * lanes, part.end - part.begin,
                                    static_cast<int>(smaller(left, lanes)), f);
  }
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
