/* Damages a weights file in every way that test_damage.py names, and uses what is still a model.
 *
 *   damage WEIGHTS */
#include <lstm_ext.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEADER 192
#define STEPS 3

static unsigned long files, models, lines;

static uint32_t crc(const unsigned char* bytes, size_t size) {
  uint32_t state = ~0u;
  for (size_t i = 0; i < size; ++i) {
    state ^= bytes[i];
    for (int bit = 0; bit < 8; ++bit) state = state >> 1 ^ (state & 1 ? 0xEDB88320u : 0);
  }
  return ~state;
}
static void sign(unsigned char* bytes, size_t size) {
  memset(bytes + 24, 0, 4);
  const uint32_t sum = crc(bytes, size);
  memcpy(bytes + 24, &sum, 4);
}

static void check(const char* error) {
  if (!error) return;
  printf("a model that does not run: %s\n", error);
  exit(1);
}

/* The bytes lie in memory of just their size. */
static void use(const unsigned char* bytes, size_t size, int allowed) {
  unsigned char* const own = malloc(size ? size : 1);
  lstm_ext_model* model = NULL;
  size_t needed;
  memcpy(own, bytes, size);
  ++files;
  const char* error = lstm_ext_model_create(own, size, &model);
  if (error) {
    lines += strlen(error) > 10 && !strchr(error, '\n') && model == NULL;
    if (!lstm_ext_model_size(own, size, &needed)) {
      printf("a size of no model\n");
      exit(1);
    }
  } else {
    if (!allowed) {
      printf("damage that is not seen, in %zu bytes\n", size);
      exit(1);
    }
    lstm_ext_description is;
    lstm_ext_stream* stream;
    const lstm_ext_setup setup = {2, STEPS, 1};
    ++models;
    check(lstm_ext_model_describe(model, &is));
    check(lstm_ext_stream_create(model, &setup, &stream));
    void* const x = calloc(STEPS * 2 * (size_t)is.input_size, 8);
    void* const y = calloc(STEPS * 2 * (size_t)(is.directions * is.output_size), 8);
    check(lstm_ext_run(stream, x, STEPS, y));
    free(x);
    free(y);
    lstm_ext_stream_destroy(stream);
    lstm_ext_model_destroy(model);
  }
  free(own);
}

static uint64_t state = 1;
static uint64_t draw(void) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return state >> 33;
}

int main(int argc, char** argv) {
  static const uint64_t values[] = {0,
                                    1,
                                    2,
                                    3,
                                    4,
                                    7,
                                    64,
                                    255,
                                    1u << 16,
                                    0x7FFFFFFF,
                                    0x80000000,
                                    0xFFFFFFFF,
                                    1ull << 32,
                                    1ull << 61,
                                    1ull << 62,
                                    1ull << 63,
                                    ~0ull,
                                    0x7FF0000000000000,
                                    0x7FF8000000000000};
  static unsigned char bytes[1 << 16], damaged[1 << 16];
  FILE* const file = argc == 2 ? fopen(argv[1], "rb") : NULL;
  if (!file) return 2;
  const size_t size = fread(bytes, 1, sizeof(bytes), file);
  fclose(file);
  if (size < HEADER || size == sizeof(bytes)) return 2;
  use(bytes, size, 1);
  for (size_t length = 0; length < size; ++length) {
    use(bytes, length, 0);
    memcpy(damaged, bytes, length);
    if (length < HEADER) continue;
    const uint64_t total = length; /* cut off by one who knows the format */
    memcpy(damaged + 16, &total, 8);
    sign(damaged, length);
    use(damaged, length, 0);
  }
  for (size_t at = 0; at < size; ++at) { /* each byte, in four ways */
    for (int way = 0; way < 4; ++way) {
      memcpy(damaged, bytes, size);
      damaged[at] ^= (unsigned char)(way == 0 ? 1 : way == 1 ? 0x80 : way == 2 ? 0xFF : 1 + draw() % 255);
      use(damaged, size, 0);
      sign(damaged, size);
      use(damaged, size, 1);
    }
  }
  for (int i = 0; i < 20000; ++i) { /* one to three fields of the header, with a valid checksum */
    memcpy(damaged, bytes, size);
    for (uint64_t count = 1 + draw() % 3; count > 0; --count) {
      const size_t width = draw() % 2 ? 4 : 8, at = 28 + draw() % ((HEADER - 28) / width - 1) * width;
      const uint64_t value = values[draw() % (sizeof(values) / sizeof(values[0]))];
      memcpy(damaged + at, &value, width);
    }
    sign(damaged, size);
    use(damaged, size, 1);
  }
  printf("%lu files, %lu models, %s\n", files, models, files == models + lines ? "each other a line" : "NO LINE");
  return files != models + lines;
}
