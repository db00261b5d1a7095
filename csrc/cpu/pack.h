// Addressing of rows, and copies of the weights in the order in which the tiles read them.
// Included inside a per-set anonymous namespace.

// Rows numbered outer * rows + inner, e.g. time step * batch + batch row. Steps may be negative.
// Where they follow no such rule, `each` lists them one by one.
template <typename T>
struct RowGrid {
  T* data;  // row 0
  int64_t outer_step, inner_step, rows;
  T* const* each = nullptr;
  LSTM_EXT_INLINE T* operator()(int64_t n) const {
    if (each) return each[n];
    // The division is worth avoiding where rows lie at one distance.
    if (outer_step == rows * inner_step) return data + n * inner_step;
    if (rows == 1) return data + n * outer_step;
    return data + n / rows * outer_step + n % rows * inner_step;
  }
};

template <typename T>
void copy(const T* from, int64_t count, T* to) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; i += n) {
    const int lanes = static_cast<int>(smaller(count - i, n));
    store_lanes<T>(to + i, load_lanes<T>(from + i, lanes), lanes);
  }
}

// v becomes its transpose, as a matrix of kLanes x kLanes numbers.
template <typename T, int Group = 1>
LSTM_EXT_INLINE void transpose(Reg<T>* v) {
  constexpr int n = Simd<T>::kLanes;
  if constexpr (Group < n) {
    using Lanes = std::make_integer_sequence<int, n>;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if ((i & Group) == 0) {
        const Reg<T> a = v[i];
        const Reg<T> b = v[i + Group];
        v[i] = pick_groups<T, Group, 0>(a, b, Lanes{});
        v[i + Group] = pick_groups<T, Group, Group>(a, b, Lanes{});
      }
    }
    transpose<T, 2 * Group>(v);
  }
}

// out[k * out_step + lane] = source[lane * count + k] for k < count; lanes from `lanes` on are zero.
template <typename T>
void pack_transposed(const T* source, int lanes, int64_t count, T* out, int64_t out_step) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  for (int64_t k = 0; k < count; k += n) {
    const int width = static_cast<int>(smaller(count - k, n));
    Reg<T> rows[n];
    if (lanes == n && width == n) {
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) rows[i] = S::load(source + i * count + k);
      transpose<T>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) S::store(out + (k + i) * out_step, rows[i]);
    } else {
      for (int i = 0; i < n; ++i) rows[i] = i < lanes ? load_lanes<T>(source + i * count + k, width) : S::zero();
      transpose<T>(rows);
      for (int i = 0; i < width; ++i) S::store(out + (k + i) * out_step, rows[i]);
    }
  }
}

// Gate-interleaved panel of kLanes hidden units of a (4H, count) weight: for each k the four gates
// of the units side by side, [k][gate][lane].
template <typename T>
void pack_gate_panel(const T* weight, int64_t hidden_size, int64_t count, int64_t block, T* out) {
  constexpr int n = Simd<T>::kLanes;
  const int64_t unit = block * n;
  const int units = static_cast<int>(smaller(hidden_size - unit, n));
  for (int gate = 0; gate < 4; ++gate) {
    pack_transposed<T>(weight + (gate * hidden_size + unit) * count, units, count, out + gate * n, 4 * n);
  }
}

// A (depth, columns) row-major matrix as the right-hand side of a product: in place, or as panels
// of the column blocks of for_each_column_block over one range of columns, [k][register][lane].
template <typename T>
struct RightHandSide {
  const T* data;
  int64_t row_step;  // of the row-major matrix
  int64_t depth;
  bool packed;

  template <int NV>
  LSTM_EXT_INLINE int64_t step() const {
    return packed ? NV * Simd<T>::kLanes : row_step;
  }
  template <int NV>
  LSTM_EXT_INLINE const T* at(int64_t column, int64_t k) const {
    return packed ? data + column * depth + k * NV * Simd<T>::kLanes : data + k * row_step + column;
  }
};

template <typename T>
void pack_columns(const T* matrix, int64_t row_step, int64_t depth, Range columns, int64_t share_index, int64_t shares,
                  T* out) {
  using S = Simd<T>;
  int64_t index = 0;
  for_each_column_block<T>(columns.begin, columns.end, [&](int64_t column, auto width, int last) {
    if (index++ % shares != share_index) return;
    constexpr int NV = width();
    T* target = out + column * depth;
    for (int64_t k = 0; k < depth; ++k, target += NV * S::kLanes) {
      const T* source = matrix + k * row_step + column;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        S::store(target + v * S::kLanes, load_lanes<T>(source + v * S::kLanes, v == NV - 1 ? last : S::kLanes));
      }
    }
  });
}
