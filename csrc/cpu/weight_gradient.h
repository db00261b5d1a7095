// Sums over time and batch: weight gradients (sums of outer products) and bias gradients.
// Included inside a per-set anonymous namespace.
//
// Partial sums over a block of kSumBlock rows are formed in registers and then added to memory:
// better locality, and a smaller rounding error than one running sum over all rows.

constexpr int64_t kSumBlock = 512;

// (outer, inner) rows of `data`, columns contiguous.
template <typename T>
struct SampleGrid {
  const T* data;
  int64_t outer_step, inner_step, outer, inner;
};

// sums[m, :] += sum over samples n of left[n][m] * right[n][:], for m in `rows`. `right` has the
// samples of `left` at its own steps.
template <typename T>
void add_outer_products(SampleGrid<T> left, Range rows, Sequence<const T> right, int64_t columns, T* sums) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  if (left.inner == 1 || (left.outer_step == left.inner * left.inner_step &&
                          right.stride_t == left.inner * right.stride_b)) {  // one run of samples
    if (left.inner > 1) {
      left.outer_step = left.inner_step;
      right.stride_t = right.stride_b;
    }
    left.inner_step = left.outer_step;
    right.stride_b = right.stride_t;
    left.inner = left.outer * left.inner;
    left.outer = 1;
  }
  const int64_t inner_block = smaller(left.inner, kSumBlock);
  const int64_t outer_block = inner_block < left.inner ? 1 : larger(1, kSumBlock / larger(inner_block, 1));
  for (int64_t outer = 0; outer < left.outer; outer += outer_block) {
    const int64_t outer_count = smaller(outer_block, left.outer - outer);
    for (int64_t inner = 0; inner < left.inner; inner += inner_block) {
      const int64_t inner_count = smaller(inner_block, left.inner - inner);
      const T* a0 = left.data + outer * left.outer_step + inner * left.inner_step;
      const T* b0 = right.data + outer * right.stride_t + inner * right.stride_b;
      for_each_column_block<T>(0, columns, [&](int64_t column, auto width, int last) LSTM_EXT_LAMBDA_INLINE {
        constexpr int NV = width();
        for_each_row_tile(rows.end - rows.begin, [&](int64_t first, auto height) {
          constexpr int R = height();
          Tile<T, R, NV> tile;
          tile.zero();
          for (int64_t i = 0; i < outer_count; ++i) {
            const T* a = a0 + i * left.outer_step + rows.begin + first;
            const T* b = b0 + i * right.stride_t + column;
            if (last == kLanes) {
              accumulate_columns<T, R, NV, false>(tile, a, left.inner_step, b, right.stride_b, inner_count, last);
            } else {
              accumulate_columns<T, R, NV, true>(tile, a, left.inner_step, b, right.stride_b, inner_count, last);
            }
          }
          T* out = sums + (rows.begin + first) * columns + column;
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              const int lanes = v == NV - 1 ? last : kLanes;
              T* at = out + r * columns + v * kLanes;
              store_lanes<T>(at, load_lanes<T>(at, lanes) + tile.acc[r][v], lanes);
            }
        });
      });
    }
  }
}

// sums[m] += sum over the rows n of matrix[n][m], for m in `columns`.
template <typename T>
void add_columns(const T* matrix, int64_t row_step, int64_t rows, Range columns, T* sums) {
  using S = Simd<T>;
  constexpr int kLanes = S::kLanes;
  for (int64_t column = columns.begin; column < columns.end; column += kLanes) {
    const int lanes = static_cast<int>(smaller(columns.end - column, kLanes));
    Reg<T> total = load_lanes<T>(sums + column, lanes);
    for (int64_t n = 0; n < rows; n += kSumBlock) {
      const int64_t end = smaller(n + kSumBlock, rows);
      Reg<T> block = S::zero();
      for (int64_t i = n; i < end; ++i) block = block + load_lanes<T>(matrix + i * row_step + column, lanes);
      total = total + block;
    }
    store_lanes<T>(sums + column, total, lanes);
  }
}
