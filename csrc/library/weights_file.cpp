#include "library/weights_file.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "cpu/kernels.h"

namespace lstm_ext::library {
namespace {

constexpr char kMagic[8] = {'\x89', 'L', 'S', 'T', 'M', '\r', '\n', '\x1a'};
constexpr uint32_t kVersion = 1, kByteOrder = 0x01020304, kOtherByteOrder = 0x04030201;
constexpr uint64_t kMostUnits = (uint64_t{1} << 31) - 1;
constexpr uint32_t kMostLayers = 1 << 16;
constexpr int64_t kArrayAlignment = 8;

// The CRC-32 of zlib, of more bytes.
struct Crc {
  uint32_t table[256];
  uint32_t state = ~0u;

  Crc() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xEDB88320u : 0);
      table[i] = value;
    }
  }
  void add(const void* bytes, size_t count) {
    const auto* const at = static_cast<const unsigned char*>(bytes);
    for (size_t i = 0; i < count; ++i) state = table[(state ^ at[i]) & 0xFF] ^ state >> 8;
  }
  uint32_t value() const { return ~state; }
};

uint32_t checksum_of(const char* bytes, size_t size) {
  FileHeader header;
  std::memcpy(&header, bytes, sizeof(header));
  header.checksum = 0;
  Crc crc;
  crc.add(&header, sizeof(header));
  crc.add(bytes + sizeof(header), size - sizeof(header));
  return crc.value();
}

// Whether T holds a bound, or there is none.
bool is_clip(double clip, bool float64) {
  const double least = float64 ? DBL_MIN : FLT_MIN, most = float64 ? DBL_MAX : FLT_MAX;
  return clip == 0 || (clip >= least && clip <= most);
}
bool is_share(double share) { return share >= 0 && share <= 1; }
bool is_activation(const FileActivation& activation, bool other, bool float64) {
  if (!other) return activation.function == 0 && activation.zero == 0 && activation.alpha == 0 && activation.beta == 0;
  const auto function = static_cast<cell::Function>(activation.function);
  if (activation.function > static_cast<uint32_t>(cell::Function::kSoftplus) || activation.zero != 0) return false;
  // T holds them.
  const double most = float64 ? DBL_MAX : FLT_MAX;
  if (!(std::abs(activation.alpha) <= most && std::abs(activation.beta) <= most)) return false;
  if (function == cell::Function::kScaledTanh) return activation.alpha >= (float64 ? DBL_MIN : FLT_MIN);
  return function == cell::Function::kAffine || activation.alpha >= 0;
}

}  // namespace

const char* failure(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof(text), format, arguments);
  va_end(arguments);
  return cpu::kept(text);
}

const char* WeightsFile::open_header(const void* given, size_t size) {
  bytes = static_cast<const char*>(given);
  header = static_cast<const FileHeader*>(given);
  if (!given) return failure("bytes: expected those of a weights file, got NULL");
  if (reinterpret_cast<uintptr_t>(given) % kArrayAlignment != 0) {
    return failure("bytes: expected an address that is a multiple of 8, got %p", given);
  }
  if (std::memcmp(bytes, kMagic, std::min(size, sizeof(kMagic))) != 0) {
    return failure("this is no weights file of lstm_ext: its first bytes are others");
  }
  if (size < sizeof(FileHeader)) {
    return failure("the weights file is cut off: it has %zu bytes, and its header alone has %zu", size,
                   sizeof(FileHeader));
  }
  if (header->byte_order == kOtherByteOrder) {
    return failure("the weights file is of the other byte order, which no machine of this library has");
  }
  if (header->byte_order != kByteOrder) return failure("the weights file is damaged: its byte order mark is none");
  if (header->version != kVersion) {
    return failure("the weights file has format %u, and this library reads format %u: save it again", header->version,
                   kVersion);
  }
  return nullptr;
}

const char* WeightsFile::open(const void* given, size_t size) {
  if (const char* const error = open_header(given, size)) return error;
  const auto total = static_cast<unsigned long long>(header->total_bytes);
  if (total > size)
    return failure("the weights file is cut off: it has %zu bytes, and its header says %llu", size, total);
  if (total < size)
    return failure("the weights file is too long: it has more than the %llu bytes of its header", total);
  if (header->checksum != checksum_of(bytes, size)) return failure("the weights file is damaged: its checksum differs");
  return check_fields();
}

// The checksum is right, so that a wrong field was written that way.
const char* WeightsFile::check_fields() const {
  const FileHeader& h = *header;
  const auto invalid = [](const char* field) {
    return failure("the weights file is not valid: its field %s has no such value", field);
  };
  if (h.flags & ~uint32_t{kAllFlags}) return invalid("flags");
  if (has(kHasLayerNorm) && (has(kHasPeepholes) || has(kIsCoupled))) return invalid("flags");
  if (has(kCarriesNormalisedCell) && !has(kHasLayerNorm)) return invalid("flags");
  if (h.float64 > 1) return invalid("dtype");
  if (h.weight_kind > static_cast<uint32_t>(WeightKind::kInt8)) return invalid("weight_kind");
  if (h.float64 != 0 && kind() != WeightKind::kOwn) return invalid("weight_kind");
  if (h.bf16_parts > 3) return invalid("bf16_parts");
  if (h.num_layers < 1 || h.num_layers > kMostLayers) return invalid("num_layers");
  if (h.directions < 1 || h.directions > 2) return invalid("directions");
  if (h.zero != 0 || h.more_zeros != 0) return invalid("zero");
  if (h.input_size < 1 || h.input_size > kMostUnits) return invalid("input_size");
  if (h.hidden_size < 1 || h.hidden_size > kMostUnits) return invalid("hidden_size");
  if (h.output_size < 1 || (has(kIsProjected) ? h.output_size >= h.hidden_size : h.output_size != h.hidden_size)) {
    return invalid("output_size");
  }
#define BOUND(name) \
  if (!is_clip(h.name, h.float64 != 0)) return invalid(#name);
#define SHARE(name, kind) \
  if (!is_share(h.name)) return invalid(#name);
#include "contract/options.def"
  for (const FileActivation& activation : h.activations) {
    if (!is_activation(activation, has(kHasOtherActivations), h.float64 != 0)) return invalid("activations");
  }
  int64_t end = sizeof(FileHeader);
  for (int64_t layer = 0; layer < h.num_layers && end >= 0; ++layer) {
    for (int64_t direction = 0; direction < h.directions && end >= 0; ++direction) end = locate(layer, end, nullptr);
  }
  if (end < 0 || static_cast<uint64_t>(end) != h.total_bytes) return invalid("total_bytes");
  bool wrong_factors = false;
  if (kind() == WeightKind::kInt8) {
    visit_directions([&](int64_t, int64_t, const FileArrays& arrays) {
      for (const void* factors : {arrays.factors_ih, arrays.factors_hh}) {
        for (uint64_t row = 0; row < 4 * h.hidden_size; ++row) {
          const float factor = static_cast<const float*>(factors)[row];
          wrong_factors |= !(factor > 0 && std::isfinite(127 * factor));
        }
      }
    });
  }
  return wrong_factors ? invalid("factors") : nullptr;
}

LayerShape WeightsFile::shape(int64_t layer) const {
  const auto outputs = static_cast<int64_t>(header->output_size);
  const int64_t inputs = layer == 0 ? static_cast<int64_t>(header->input_size) : header->directions * outputs;
  LayerShape shape{};
  shape.steps = shape.batch = 1;
  shape.input_size = inputs;
  shape.hidden_size = static_cast<int64_t>(header->hidden_size);
  shape.output_size = outputs;
  shape.projected = has(kIsProjected);
  shape.two_directions = header->directions == 2;
  return shape;
}

int64_t WeightsFile::locate(int64_t layer, int64_t at, FileArrays* arrays) const {
  const LayerShape s = shape(layer);
  const int64_t gates = 4 * s.hidden_size, number = header->float64 != 0 ? 8 : 4;
  const int64_t weight = kind() == WeightKind::kOwn ? number : kind() == WeightKind::kInt8 ? 1 : 2;
  const auto size = static_cast<int64_t>(header->total_bytes);
  bool too_short = false;
  const auto array = [&](const void* FileArrays::* place, int64_t rows, int64_t columns, int64_t element) {
    int64_t end = 0;
    too_short |=
        __builtin_mul_overflow(rows, columns, &end) || __builtin_mul_overflow(end, element, &end) || end > size - at;
    if (too_short) return;
    if (arrays) arrays->*place = bytes + at;
    at += (end + kArrayAlignment - 1) / kArrayAlignment * kArrayAlignment;
  };
  array(&FileArrays::weight_ih, gates, s.input_size, weight);
  if (kind() == WeightKind::kInt8) array(&FileArrays::factors_ih, gates, 1, sizeof(float));
  array(&FileArrays::weight_hh, gates, s.output_size, weight);
  if (kind() == WeightKind::kInt8) array(&FileArrays::factors_hh, gates, 1, sizeof(float));
  if (has(kHasBias)) {
    array(&FileArrays::bias_ih, gates, 1, number);
    array(&FileArrays::bias_hh, gates, 1, number);
  }
  if (has(kIsProjected)) array(&FileArrays::weight_hr, s.output_size, s.hidden_size, number);
  if (has(kHasLayerNorm)) {
    array(&FileArrays::gain_ih, gates, 1, number);
    array(&FileArrays::gain_hh, gates, 1, number);
    array(&FileArrays::gain_c, s.hidden_size, 1, number);
    if (has(kHasBias)) array(&FileArrays::bias_c, s.hidden_size, 1, number);
  }
  if (has(kHasPeepholes)) {
    array(&FileArrays::weight_ci, s.hidden_size, 1, number);
    array(&FileArrays::weight_cf, s.hidden_size, 1, number);
    array(&FileArrays::weight_co, s.hidden_size, 1, number);
  }
  return too_short ? -1 : at;
}

}  // namespace lstm_ext::library
