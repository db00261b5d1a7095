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

template <typename T>
LSTM_EXT_INLINE T sum_of_lanes(Reg<T> v) {
  alignas(64) T lanes[Simd<T>::kLanes];
  Simd<T>::store(lanes, v);
#pragma GCC unroll 4
  for (int half = Simd<T>::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// For pieces of kLanes of `count` numbers: f(first, lanes).
template <typename T, typename F>
LSTM_EXT_INLINE void for_each_piece(int64_t count, F&& f) {
  constexpr int n = Simd<T>::kLanes;
  for (int64_t i = 0; i < count; i += n) f(i, static_cast<int>(smaller(count - i, n)));
}

LSTM_EXT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
LSTM_EXT_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// The sum of f(first, lanes) over the pieces of `count` numbers; lanes that are not there must be 0. In four parts,
// since each addition waits for the one before.
template <typename T, typename F>
LSTM_EXT_INLINE T sum_over(int64_t count, F&& f) {
  constexpr int n = Simd<T>::kLanes;
  Reg<T> sums[4] = {Simd<T>::zero(), Simd<T>::zero(), Simd<T>::zero(), Simd<T>::zero()};
  int64_t i = 0;
  for (; i + 4 * n <= count; i += 4 * n) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = sums[k] + f(i + k * n, n);
  }
  for (; i < count; i += n) sums[0] = sums[0] + f(i, static_cast<int>(smaller(count - i, n)));
  return sum_of_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x becomes (x - mean) / sqrt(variance + epsilon), with the biased variance; returns 1 / that root. `from` may be x.
//
// The mean that is taken off is rounded, which shifts all that is left by as much. Where the numbers lie close together
// that shows, so what is left is centred once more (Chan, Golub and LeVeque, 1983, the corrected two-pass algorithm).
template <typename T>
LSTM_EXT_INLINE T normalise(const T* from, int64_t count, T* x) {
  using S = Simd<T>;
  constexpr int n = S::kLanes;
  const T number = static_cast<T>(count);
  const T sum =
      sum_over<T>(count, [&](int64_t i, int lanes) LSTM_EXT_LAMBDA_INLINE { return load_lanes<T>(from + i, lanes); });
  const Reg<T> mean = S::set1(sum / number);
  // Two of each, since each addition waits for the one before.
  Reg<T> sums[2] = {S::zero(), S::zero()}, squares[2] = {S::zero(), S::zero()};
  int64_t i = 0;
  for (; i + 2 * n <= count; i += 2 * n) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      const Reg<T> d = S::load(from + i + k * n) - mean;
      sums[k] = sums[k] + d;
      squares[k] = S::fma(d, d, squares[k]);
    }
  }
  for (; i < count; i += n) {
    const int lanes = static_cast<int>(smaller(count - i, n));
    Reg<T> d = load_lanes<T>(from + i, lanes) - mean;
    if (lanes < n) {
      alignas(64) T difference[n];
      S::store(difference, d);
      d = S::load_partial(difference, lanes);
    }
    sums[0] = sums[0] + d;
    squares[0] = S::fma(d, d, squares[0]);
  }
  const T rest = sum_of_lanes<T>(sums[0] + sums[1]) / number;
  const T variance = sum_of_lanes<T>(squares[0] + squares[1]) / number - rest * rest;
  const T factor = T(1) / square_root(variance + static_cast<T>(kLayerNormEpsilon));
  const Reg<T> scale = S::set1(factor), shift = S::set1(rest);
  for_each_piece<T>(count, [&](int64_t at, int lanes) LSTM_EXT_LAMBDA_INLINE {
    store_lanes<T>(x + at, ((load_lanes<T>(from + at, lanes) - mean) - shift) * scale, lanes);
  });
  return factor;
}
