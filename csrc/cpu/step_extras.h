// What the passes have in common of the extras of a step. Included inside a per-set anonymous namespace.

// Where a flag is set, a, else b: not a product, since what is not taken may be infinite.
template <typename T>
LSTM_EXT_INLINE Reg<T> where(const uint8_t* flags, int lanes, Reg<T> a, Reg<T> b) {
  using Index = typename Simd<T>::Index;
  typename Simd<T>::Bytes bytes = {};
  if (lanes == Simd<T>::kLanes) {
    __builtin_memcpy(&bytes, flags, sizeof(bytes));
  } else {
    for (int i = 0; i < lanes; ++i) bytes[i] = flags[i];
  }
  return __builtin_convertvector(bytes, Index) != 0 ? a : b;
}

// What zoneout makes of the new state and of the one before: of one row of `lanes` units, from `flags` on, or, if that
// is null, in the mean.
template <typename T>
LSTM_EXT_INLINE Reg<T> zoned(Reg<T> fresh, Reg<T> before, const uint8_t* flags, T share, int lanes) {
  if (flags) return where<T>(flags, lanes, before, fresh);
  // From the nearer end, as torch.lerp.
  if (share < T(0.5)) return Simd<T>::fma(Simd<T>::set1(share), before - fresh, fresh);
  return Simd<T>::fma(Simd<T>::set1(T(1) - share), fresh - before, before);
}

// Splits dL/d(state) into what belongs to the state before, which is returned, and to the new one, which stays.
template <typename T>
LSTM_EXT_INLINE Reg<T> kept_gradient(Reg<T>& grad, const uint8_t* flags, T share, int lanes) {
  const Reg<T> zero = Simd<T>::zero();
  Reg<T> kept;
  if (flags) {
    kept = where<T>(flags, lanes, grad, zero);
    grad = where<T>(flags, lanes, zero, grad);
  } else {
    kept = grad * Simd<T>::set1(share);
    grad = grad - kept;
  }
  return kept;
}

// Within registers where the compiler can: a sum by way of memory waits for the stores.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define LSTM_EXT_SHUFFLES
#endif
#endif
template <typename V, int kStep, int... kLane>
LSTM_EXT_INLINE V lanes_from(V v, std::integer_sequence<int, kLane...>) {
#ifdef LSTM_EXT_SHUFFLES
  return __builtin_shufflevector(v, v, (kLane ^ kStep)...);
#else
  return V{v[kLane ^ kStep]...};
#endif
}

// The sum of the lanes, in each of them.
template <typename T, int kStep = Simd<T>::kLanes / 2>
LSTM_EXT_INLINE Reg<T> sum_of_lanes(Reg<T> v) {
  if constexpr (kStep > 0) {
    v = v + lanes_from<Reg<T>, kStep>(v, std::make_integer_sequence<int, Simd<T>::kLanes>{});
    return sum_of_lanes<T, kStep / 2>(v);
  }
  return v;
}

// For pieces of kLanes of `count` numbers: f(first, lanes).
template <typename T, typename F>
LSTM_EXT_INLINE void for_each_piece(int64_t count, F&& f) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; i += n) f(i, static_cast<int>(smaller(count - i, n)));
}

// Each of some rows of `count` numbers becomes (x - mean) / sqrt(variance + epsilon), with the biased variance;
// `factors` get 1 / that root.
template <typename T, int kRows>
LSTM_EXT_INLINE void normalise(T* const* rows, int64_t count, T* factors) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  const Reg<T> number = S::set1(static_cast<T>(count));
  Reg<T> mean[kRows], factor[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) mean[r] = S::zero();
  for_each_piece<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) mean[r] = mean[r] + load_lanes<T>(rows[r] + i, lanes);
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    mean[r] = sum_of_lanes<T>(mean[r]) / number;
    factor[r] = S::zero();
  }
  for_each_piece<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      Reg<T> d = load_lanes<T>(rows[r] + i, lanes) - mean[r];
      if (lanes < n) {
        alignas(64) T difference[n];
        S::store(difference, d);
        d = S::load_partial(difference, lanes);
      }
      factor[r] = S::fma(d, d, factor[r]);
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    const Reg<T> variance = sum_of_lanes<T>(factor[r]) / number;
    factor[r] = S::set1(T(1)) / S::square_root(variance + S::set1(static_cast<T>(kLayerNormEpsilon)));
    S::store_partial(factors + r, factor[r], 1);
  }
  for_each_piece<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      store_lanes<T>(rows[r] + i, (load_lanes<T>(rows[r] + i, lanes) - mean[r]) * factor[r], lanes);
    }
  });
}

// At most kNormRows rows, side by side: in each the sums and the root wait for one another.
template <typename T>
LSTM_EXT_INLINE void normalise(T* const* rows, int64_t number_of_rows, int64_t count, T* factors) {
  if (number_of_rows == kNormRows) {
    normalise<T, kNormRows>(rows, count, factors);
  } else {
    for (int64_t r = 0; r < number_of_rows; ++r) normalise<T, 1>(rows + r, count, factors + r);
  }
}
