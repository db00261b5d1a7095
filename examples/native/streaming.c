/* Reads a stream of features one frame at a time, and says how long a step takes.
 *
 *   streaming WEIGHTS [FEATURES]
 *
 * FEATURES is a file of float32 numbers, frame after frame. Without it, 20000 frames of sines stand in for them. */
#define _POSIX_C_SOURCE 199309L
#include <lstm_ext.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define FRAMES 20000

static int failed(const char* error) {
  if (error) fprintf(stderr, "error: %s\n", error);
  return error != NULL;
}

/* The next frame; 0 at the end. */
static int next_frame(FILE* file, long frame, float* x, size_t count) {
  size_t i;
  if (file) return fread(x, sizeof(float), count, file) == count;
  for (i = 0; i < count; ++i) x[i] = (float)sin(0.01 * (double)frame * (double)(i + 1));
  return frame < FRAMES;
}

static double microseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

static int compare(const void* a, const void* b) {
  const double left = *(const double*)a, right = *(const double*)b;
  return (left > right) - (left < right);
}

int main(int argc, char** argv) {
  const lstm_ext_setup setup = {1, 1, 1}; /* one sequence, one step a call, one thread */
  lstm_ext_model* model = NULL;
  lstm_ext_stream* stream = NULL;
  lstm_ext_description description;
  FILE* file = NULL;
  float *x, *y;
  double* times;
  long frames = 0;
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: %s WEIGHTS [FEATURES]\n", argv[0]);
    return 2;
  }
  if (lstm_ext_abi_version() != LSTM_EXT_ABI_VERSION) {
    fprintf(stderr, "error: this program was compiled for another lstm_ext\n");
    return 2;
  }
  if (failed(lstm_ext_model_load(argv[1], &model)) || failed(lstm_ext_model_describe(model, &description)) ||
      failed(lstm_ext_stream_create(model, &setup, &stream))) {
    return 1;
  }
  if (description.dtype != LSTM_EXT_FLOAT32 || description.directions != 1) {
    fprintf(stderr, "error: expected a layer in float32, of one direction\n");
    return 1;
  }
  if (argc == 3 && !(file = fopen(argv[2], "rb"))) {
    fprintf(stderr, "error: could not open '%s'\n", argv[2]);
    return 1;
  }
  x = malloc((size_t)description.input_size * sizeof(float));
  y = malloc((size_t)description.output_size * sizeof(float));
  times = malloc(FRAMES * sizeof(double));
  if (!x || !y || !times) return 1;

  while (next_frame(file, frames, x, (size_t)description.input_size)) {
    const double begin = microseconds();
    if (failed(lstm_ext_step(stream, x, y))) return 1;
    times[frames % FRAMES] = microseconds() - begin;
    ++frames;
  }
  printf("%ld frames on %s", frames, description.capability);
  if (frames > 0) {
    printf("; the first output of the last one is %.9g\n", y[0]);
    const size_t count = frames < FRAMES ? (size_t)frames : FRAMES;
    qsort(times, count, sizeof(double), compare);
    printf("a step: median %.2f us, 99.9th percentile %.2f us\n", times[count / 2], times[count * 999 / 1000]);
  } else {
    printf("\n");
  }

  free(times);
  free(y);
  free(x);
  if (file) fclose(file);
  lstm_ext_stream_destroy(stream);
  lstm_ext_model_destroy(model);
  return 0;
}
