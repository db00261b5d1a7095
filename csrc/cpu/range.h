// Ranges of numbers, and how they are divided into shares.
#pragma once

#include "cpu/isa.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

LSTM_EXT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LSTM_EXT_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};

// Part `index` of [0, count), which is cut into `parts` of nearly equal size.
LSTM_EXT_INLINE Range share(int64_t count, int64_t parts, int64_t index) {
  return {count * index / parts, count * (index + 1) / parts};
}

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
