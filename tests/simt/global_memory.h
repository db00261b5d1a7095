// Memory that kernels get from their caller. DeviceBuffer stands for a cudaMalloc: fenced on both sides, filled with
// NaNs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <string>
#include <vector>

namespace simt {

// A fenced stretch of bytes.
class FencedMemory {
 public:
  FencedMemory(size_t bytes, size_t granularity, std::string name);
  ~FencedMemory();
  FencedMemory(const FencedMemory&) = delete;
  FencedMemory& operator=(const FencedMemory&) = delete;
  char* data() const { return data_; }
  // What is wrong with the fences; empty where nothing is.
  std::string check() const;

 private:
  char* allocation_;
  char* data_;
  size_t bytes_;
  std::string name_;
};

template <typename T>
class DeviceBuffer {
 public:
  explicit DeviceBuffer(size_t count, const char* name = "global")
      : count_(count), memory_(count * sizeof(T), sizeof(T), name) {}
  DeviceBuffer(size_t count, T value, const char* name = "global") : DeviceBuffer(count, name) {
    std::fill(begin(), end(), value);
  }
  explicit DeviceBuffer(const std::vector<T>& values, const char* name = "global") : DeviceBuffer(values.size(), name) {
    std::copy(values.begin(), values.end(), begin());
  }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  T* begin() const { return data(); }
  T* end() const { return data() + count_; }
  size_t size() const { return count_; }
  T& operator[](size_t index) const { return data()[index]; }
  std::vector<T> values() const { return std::vector<T>(begin(), end()); }

 private:
  size_t count_;
  FencedMemory memory_;
};

// Memory that the launch in front of a dependent one does not write: weights.
class ConstantMemory {
 public:
  ConstantMemory(const void* memory, size_t bytes);
  ~ConstantMemory();
  ConstantMemory(const ConstantMemory&) = delete;
  ConstantMemory& operator=(const ConstantMemory&) = delete;

 private:
  const char* memory_;
};

}  // namespace simt
