// Streams with memory that the program has from the beginning: nothing asks the C library for any.
//
//   no_allocation WEIGHTS
#include <fcntl.h>
#include <lstm_ext.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdio>

namespace {

constexpr int64_t kFrames = 16, kMostFeatures = 256;

// Large enough for the models of this program.
alignas(64) std::array<unsigned char, 1 << 20> file;
alignas(64) std::array<unsigned char, 4 << 20> model_memory;
alignas(64) std::array<unsigned char, 1 << 20> stream_memory;
std::array<float, kFrames * kMostFeatures> x, y;

int fail(const char* error) {
  std::fprintf(stderr, "error: %s\n", error);
  return 1;
}

// The bytes of the file, or 0.
size_t read_whole(const char* path) {
  const int descriptor = open(path, O_RDONLY);
  if (descriptor < 0) return 0;
  size_t size = 0;
  for (ssize_t count = 1; count > 0 && size < file.size();) {
    count = read(descriptor, file.data() + size, file.size() - size);
    if (count > 0) size += static_cast<size_t>(count);
  }
  close(descriptor);
  return size;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return fail("usage: no_allocation WEIGHTS");
  const size_t size = read_whole(argv[1]);
  if (size == 0) return fail("the weights file could not be read");

  lstm_ext_model* model = nullptr;
  if (const char* error = lstm_ext_model_create_in(file.data(), size, model_memory.data(), model_memory.size(), &model))
    return fail(error);
  lstm_ext_description description;
  if (const char* error = lstm_ext_model_describe(model, &description)) return fail(error);
  if (description.input_size > kMostFeatures || description.directions * description.output_size > kMostFeatures ||
      description.dtype != LSTM_EXT_FLOAT32) {
    return fail("the layer does not fit into this program");
  }
  const lstm_ext_setup setup{1, kFrames, 1};
  size_t needed = 0;
  if (const char* error = lstm_ext_stream_size(model, &setup, &needed)) return fail(error);
  lstm_ext_stream* stream = nullptr;
  if (const char* error = lstm_ext_stream_create_in(model, &setup, stream_memory.data(), stream_memory.size(), &stream))
    return fail(error);

  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
  if (const char* error = lstm_ext_run(stream, x.data(), kFrames, y.data())) return fail(error);
  const auto last = static_cast<size_t>((kFrames - 1) * description.directions * description.output_size);
  std::printf("%lld steps in %zu bytes; the first output of the last one is %.9g\n", static_cast<long long>(kFrames),
              needed, static_cast<double>(y[last]));
  lstm_ext_stream_destroy(stream);
  lstm_ext_model_destroy(model);
  return 0;
}
