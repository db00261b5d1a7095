// What the passes have in common of the extras of a step. Included inside a per-set anonymous namespace.

// 1 where a flag is set, else 0.
template <typename T>
LSTM_EXT_INLINE Reg<T> flag_lanes(const uint8_t* flags, int lanes) {
  constexpr int n = Simd<T>::kLanes;
  alignas(64) T values[n];
  if (lanes == n) {
    for (int i = 0; i < n; ++i) values[i] = flags[i] != 0 ? T(1) : T(0);
  } else {
    for (int i = 0; i < n; ++i) values[i] = i < lanes && flags[i] != 0 ? T(1) : T(0);
  }
  return Simd<T>::load(values);
}

// Where `flags` (0 or 1) are 1, a, else b: not a product, since what is not taken may be infinite.
template <typename T>
LSTM_EXT_INLINE Reg<T> where(Reg<T> flags, Reg<T> a, Reg<T> b) {
  return flags != Simd<T>::zero() ? a : b;
}

// What zoneout makes of the new state and of the one before: of one row of `lanes` units, from `flags` on, or, if that
// is null, in the mean.
template <typename T>
LSTM_EXT_INLINE Reg<T> zoned(Reg<T> fresh, Reg<T> before, const uint8_t* flags, T share, int lanes) {
  if (flags) return where<T>(flag_lanes<T>(flags, lanes), before, fresh);
  return Simd<T>::fma(Simd<T>::set1(share), before - fresh, fresh);
}

// Splits dL/d(state) into what belongs to the state before, which is returned, and to the new one, which stays.
template <typename T>
LSTM_EXT_INLINE Reg<T> kept_gradient(Reg<T>& grad, const uint8_t* flags, T share, int lanes) {
  const Reg<T> zero = Simd<T>::zero();
  Reg<T> kept;
  if (flags) {
    const Reg<T> of_row = flag_lanes<T>(flags, lanes);
    kept = where<T>(of_row, grad, zero);
    grad = where<T>(of_row, zero, grad);
  } else {
    kept = grad * Simd<T>::set1(share);
    grad = grad - kept;
  }
  return kept;
}

template <typename T>
LSTM_EXT_INLINE T sum_of_lanes(Reg<T> v) {
  alignas(64) T lanes[Simd<T>::kLanes];
  Simd<T>::store(lanes, v);
  T sum = 0;
  for (int i = 0; i < Simd<T>::kLanes; ++i) sum += lanes[i];
  return sum;
}

// For pieces of kLanes of `count` numbers: f(first, lanes).
template <typename T, typename F>
LSTM_EXT_INLINE void for_each_piece(int64_t count, F&& f) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; i += n) f(i, static_cast<int>(smaller(count - i, n)));
}

LSTM_EXT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LSTM_EXT_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// x becomes (x - mean) / sqrt(variance + epsilon), with the biased variance; returns 1 / that root. `from` may be x.
template <typename T>
LSTM_EXT_INLINE T normalise(const T* from, int64_t count, T* x) {
  using S = Simd<T>;
  Reg<T> sum = S::zero();
  for_each_piece<T>(count,
                    [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE { sum = sum + load_lanes<T>(from + i, lanes); });
  const Reg<T> mean = S::set1(sum_of_lanes<T>(sum) / static_cast<T>(count));
  Reg<T> squares = S::zero();
  for_each_piece<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
    Reg<T> d = load_lanes<T>(from + i, lanes) - mean;
    if (lanes < S::kLanes) {  // those that are not there must not count
      alignas(64) T difference[S::kLanes];
      S::store(difference, d);
      d = S::load_partial(difference, lanes);
    }
    squares = S::fma(d, d, squares);
  });
  const T variance = sum_of_lanes<T>(squares) / static_cast<T>(count);
  const T factor = T(1) / square_root(variance + static_cast<T>(kLayerNormEpsilon));
  const Reg<T> scale = S::set1(factor);
  for_each_piece<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE {
    store_lanes<T>(x + i, (load_lanes<T>(from + i, lanes) - mean) * scale, lanes);
  });
  return factor;
}
