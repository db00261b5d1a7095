// Registers of 16 numbers in plain C++, for csrc/cpu/simd.h: they give the bits of AVX-512's.
constexpr int kVectorRegisters = 32;

// Infinities and NaN are preserved.
inline float widened(BFloat16 number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(bits));
  return result;
}
inline float widened(Float16 number) {
  const uint32_t sign = (number.bits & 0x8000u) << 16, magnitude = number.bits & 0x7FFFu;
  uint32_t bits = sign | ((magnitude << 13) + (magnitude < 0x7C00 ? 112u << 23 : 224u << 23));
  if (magnitude < 0x400) {  // magnitude * 2^-24
    const float small = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f;
    __builtin_memcpy(&bits, &small, sizeof(bits));
    bits |= sign;
  }
  float result;
  __builtin_memcpy(&result, &bits, sizeof(bits));
  return result;
}

template <>
struct Simd<float> {
  typedef float Reg __attribute__((vector_size(64)));
  typedef int Index __attribute__((vector_size(64)));
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  static constexpr int kLanes = 16;
  static Reg zero() { return Reg{}; }
  static Reg set1(float x) { return x - Reg{}; }
  static Reg load(const float* p) {
    Reg v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static Reg load(const int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
  }
  template <typename W>
  static Reg load(const W* p) {
    return each([&](int i) { return widened(p[i]); });
  }
  static void store(float* p, Reg v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Reg load_partial(const float* p, int n) {
    Reg v = {};
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static void store_partial(float* p, Reg v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
  static Reg fma(Reg a, Reg b, Reg c) {
    return each([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
  }
  static Reg at_most(Reg v, float bound) { return set1(bound) < v ? set1(bound) : v; }
  static Reg at_least(Reg v, float bound) { return set1(bound) > v ? set1(bound) : v; }
  static Reg square_root(Reg v) {
    return each([&](int i) { return __builtin_sqrtf(v[i]); });
  }
  static Reg reciprocal(Reg v) {
#if defined(__AVX512F__)  // rcp14 is not the same on every processor
    const Reg near = _mm512_rcp14_ps(v);
    return fma(near, fma(-near, v, set1(1.0f)), near);
#else
    return set1(1.0f) / v;
#endif
  }
  static Reg abs(Reg v) { return reinterpret_cast<Reg>(reinterpret_cast<Index>(v) & 0x7FFFFFFF); }
  static Reg copy_sign(Reg magnitude, Reg sign) {
    return reinterpret_cast<Reg>((reinterpret_cast<Index>(magnitude) & 0x7FFFFFFF) |
                                 (reinterpret_cast<Index>(sign) & INT32_MIN));
  }
  static Reg round(Reg v) {
    return each([&](int i) { return __builtin_nearbyintf(v[i]); });
  }
  static Reg scale_by_power_of_two(Reg v, Reg n) {
    return each([&](int i) { return __builtin_ldexpf(v[i], static_cast<int>(n[i])); });
  }
  static Reg power_of_sixteenth(Reg n) {
    Index bits = reinterpret_cast<Index>(n);
    for (int i = 0; i < kLanes; ++i) {
      const uint32_t number = static_cast<uint32_t>(bits[i]);
      bits[i] = static_cast<int>(kPowerBits[number % 16] + (number << 19));
    }
    return reinterpret_cast<Reg>(bits);
  }
  static Reg rest_of_sixteenth(Reg n) {
    return each([&](int i) { return kPowerRest[static_cast<uint32_t>(reinterpret_cast<Index>(n)[i]) % 16]; });
  }

 private:
  template <typename F>
  static Reg each(F&& f) {
    Reg v;
    for (int i = 0; i < kLanes; ++i) v[i] = f(i);
    return v;
  }
};

// Never run: the kernels of float64 have no tile engine.
template <>
struct Simd<double>;
