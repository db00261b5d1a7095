// The weights file of the C library, checked. docs/guide/c-library.md describes it byte by byte; lstm_ext/nn/native.py
// writes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "contract/params.h"

namespace lstm_ext::library {

// Writes a line for the caller, and keeps it as cpu::kept does.
__attribute__((format(printf, 1, 2))) const char* failure(const char* format, ...);

struct FileActivation {
  uint32_t function, zero;
  double alpha, beta;
};

struct FileHeader {
  char magic[8];
  uint32_t version, byte_order;
  uint64_t total_bytes;
  uint32_t checksum, flags;
  uint32_t float64, weight_kind, bf16_parts, num_layers, directions, zero;
  uint64_t input_size, hidden_size, output_size;
  double cell_clip, preactivation_clip, zoneout_h, zoneout_c;
  FileActivation activations[3];  // those of cell::Options, in its order
  uint64_t more_zeros;
};
static_assert(sizeof(FileHeader) == 192);

enum FileFlag : uint32_t {
  kHasBias = 1,
  kIsProjected = 2,
  kHasPeepholes = 4,
  kHasLayerNorm = 8,
  kIsCoupled = 16,
  kHasOtherActivations = 32,
  kCarriesNormalisedCell = 64,
  kAllFlags = 127
};

// The arrays of one direction of one layer, in the file's bytes; null where it has none. Weights are of the kind of the
// header, factors are float, and all others are of its dtype.
struct FileArrays {
  const void *weight_ih, *factors_ih, *weight_hh, *factors_hh, *bias_ih, *bias_hh, *weight_hr;
  const void *gain_ih, *gain_hh, *gain_c, *bias_c, *weight_ci, *weight_cf, *weight_co;
};

struct WeightsFile {
  const char* bytes;
  const FileHeader* header;

  // Checks what the file begins with; returns an error or null.
  const char* open_header(const void* given, size_t size);
  // Checks everything.
  const char* open(const void* given, size_t size);

  bool has(FileFlag flag) const { return (header->flags & flag) != 0; }
  WeightKind kind() const { return static_cast<WeightKind>(header->weight_kind); }
  LayerShape shape(int64_t layer) const;  // with one step of one row
  // All arrays, by layer and direction: calls visit(layer, direction, arrays).
  template <typename Visit>
  void visit_directions(const Visit& visit) const {
    int64_t at = sizeof(FileHeader);
    for (int64_t layer = 0; layer < header->num_layers; ++layer) {
      for (int64_t direction = 0; direction < header->directions; ++direction) {
        FileArrays arrays{};
        at = locate(layer, at, &arrays);
        visit(layer, direction, arrays);
      }
    }
  }

 private:
  const char* check_fields() const;
  // Returns the end of the arrays that begin at `at`, or -1 if the file is too short for them. `arrays` may be null.
  int64_t locate(int64_t layer, int64_t at, FileArrays* arrays) const;
};

}  // namespace lstm_ext::library
