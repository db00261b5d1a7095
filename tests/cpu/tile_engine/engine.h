// The tile engine in plain C++, for csrc/cpu/tile_engine.h: it gives the bits of AMX, and of AVX-512-BF16.
struct TileEngine {
  struct Registers {};
  static void begin(Registers&) {
    for (Tile& tile : tiles()) tile = {};
  }
  static void end() {}

  template <int kTile>
  static void zero() {
    tiles()[kTile] = {};
  }
  template <int kTile>
  static void load(const void* tile) {
    __builtin_memcpy(&tiles()[kTile], tile, sizeof(Tile));
  }
  template <int kTile>
  static void store(float* tile) {
    __builtin_memcpy(tile, &tiles()[kTile], sizeof(Tile));
  }
  static void keep_awake() {}
  template <int kSum, int kLeft, int kRight>
  static void multiply_add() {
    multiply_add(tiles()[kSum], tiles()[kLeft], tiles()[kRight]);
  }

  struct Half {
    uint16_t numbers[16];
  };
  static Half round(Reg<float> v) {
    Half half;
    for (int i = 0; i < 16; ++i) half.numbers[i] = round(v[i]);
    return half;
  }
  static void store_half(uint16_t* to, Half v) { __builtin_memcpy(to, &v, sizeof(v)); }

  struct Words {
    uint32_t words[16];
  };
  static Words pairs(Half a, Half b) {
    Words words;
    for (int i = 0; i < 16; ++i) words.words[i] = a.numbers[i] | static_cast<uint32_t>(b.numbers[i]) << 16;
    return words;
  }
  static void store_words(uint16_t* to, Words v) { __builtin_memcpy(to, &v, sizeof(v)); }

  using Pairs = typename Simd<float>::Index;
  static Pairs load_pairs(const uint16_t* columns) {
    Pairs pairs;
    __builtin_memcpy(&pairs, columns, sizeof(pairs));
    return pairs;
  }
  static Pairs broadcast_pair(const uint16_t* row) {
    int32_t pair;
    __builtin_memcpy(&pair, row, sizeof(pair));
    return Pairs{} + pair;
  }
  // The second numbers of the pairs come first. Not inlined: it would take long to compile.
  __attribute__((noinline)) static Reg<float> multiply_add(Reg<float> sums, Pairs row, Pairs columns) {
    const uint32_t pair = static_cast<uint32_t>(row[0]);
    return add_product(pair << 16, columns << 16,
                       add_product(pair & kUpper, columns & static_cast<int>(kUpper), flush(sums)));
  }

 private:
  struct Tile {
    uint32_t words[16][16];
  };
  static Tile (&tiles())[8] {
    static thread_local Tile all[8];
    return all;
  }

  static constexpr uint32_t kUpper = 0xFFFF0000;

  static float number(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static uint32_t bits(float x) {
    uint32_t u;
    __builtin_memcpy(&u, &x, sizeof(u));
    return u;
  }
  static bool denormal(uint32_t u) { return (u & 0x7F800000) == 0; }
  static uint16_t round(float x) {
    const uint32_t u = bits(x);
    if (x != x) return static_cast<uint16_t>(u >> 16 | 0x40);
    if (denormal(u)) return static_cast<uint16_t>(u >> 16 & 0x8000);
    return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }

  // Sixteen columns at once. Denormals are zeros of their sign, going in and coming out.
  static Reg<float> flush(Reg<float> v) {
    using Index = typename Simd<float>::Index;
    const Index u = reinterpret_cast<Index>(v);
    return reinterpret_cast<Reg<float>>((u & 0x7F800000) == 0 ? u & INT32_MIN : u);
  }
  static Reg<float> row(const uint32_t* words) { return Simd<float>::load(reinterpret_cast<const float*>(words)); }
  static Reg<float> add_product(uint32_t a, typename Simd<float>::Index b, Reg<float> sum) {
    const Reg<float> left = flush(Simd<float>::set1(number(a)));
    return flush(Simd<float>::fma(left, flush(reinterpret_cast<Reg<float>>(b)), sum));
  }
  static void multiply_add(Tile& sums, const Tile& left, const Tile& right) {
    using Index = typename Simd<float>::Index;
    for (int m = 0; m < 16; ++m) {
      Reg<float> even{}, odd{};
      for (int k = 0; k < 16; ++k) {
        const uint32_t a = left.words[m][k];
        const Index b = reinterpret_cast<Index>(row(right.words[k]));
        even = add_product(a << 16, b << 16, even);
        odd = add_product(a & kUpper, b & static_cast<int>(kUpper), odd);
      }
      const Reg<float> sum = flush(flush(row(sums.words[m])) + flush(even + odd));
      __builtin_memcpy(sums.words[m], &sum, sizeof(sum));
    }
  }
};

// Sizes from which on it is used: small ones, so that tests need no large ones. In tiles, and in pairs.
constexpr EngineLimits kLimitsOfTiles{{0, 8, 8, 8},    {0, 8, 8, 8}, {0, 32, 32, 32}, {0, 32, 32, 32}, {0, 8, 3.5, 2},
                                      kEngineTileRows, true};
constexpr EngineLimits kLimitsOfPairs{
    {0, 1, kNever, kNever}, {0, 1, kNever, kNever}, {0, 16, 0, 0}, {0, 16, 0, 0}, {0, 2, 1, 1}, 1, false};
