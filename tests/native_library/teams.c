/* Several threads compute one stream; the results are those of one thread. For the thread sanitizer: test_threads.py.
 *
 *   teams WEIGHTS BATCH */
#include <lstm_ext.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STEPS 12
#define CALLS 24
#define MOST_THREADS 4

static lstm_ext_stream* stream;
static lstm_ext_description is;
static float *x, *y, *results;
static size_t inputs, outputs;
static long batch;

static void check(const char* error) {
  if (!error) return;
  fprintf(stderr, "%s\n", error);
  exit(1);
}

/* Worker 0 fills x before each call and takes y after it; the others only call. */
static void* work(void* number) {
  const long worker = (long)number;
  for (int call = 0; call < CALLS; ++call) {
    const long steps = 1 + call * 5 % STEPS;
    if (worker == 0) {
      for (size_t i = 0; i < inputs; ++i) x[i] = (float)((i * 7 + (size_t)call * 3) % 13) / 6 - 1;
    }
    check(lstm_ext_run_part(stream, x, steps, y, worker));
    if (worker == 0) memcpy(results + (size_t)call * outputs, y, outputs * sizeof(float));
  }
  return NULL;
}

int main(int argc, char** argv) {
  lstm_ext_model* model;
  if (argc != 3) return 2;
  batch = atol(argv[2]);
  check(lstm_ext_model_load(argv[1], &model));
  check(lstm_ext_model_describe(model, &is));
  inputs = STEPS * (size_t)(batch * is.input_size);
  outputs = STEPS * (size_t)(batch * is.directions * is.output_size);
  x = malloc(inputs * sizeof(float));
  float* const expected = malloc(CALLS * outputs * sizeof(float));
  for (long threads = 1; threads <= MOST_THREADS; ++threads) {
    const lstm_ext_setup setup = {batch, STEPS, threads};
    pthread_t helpers[MOST_THREADS];
    y = calloc(outputs, sizeof(float));
    results = threads == 1 ? expected : malloc(CALLS * outputs * sizeof(float));
    check(lstm_ext_stream_create(model, &setup, &stream));
    for (long worker = 1; worker < threads; ++worker) {
      if (pthread_create(&helpers[worker], NULL, work, (void*)worker) != 0) return 2;
    }
    work(NULL);
    for (long worker = 1; worker < threads; ++worker) pthread_join(helpers[worker], NULL);
    const int same = memcmp(results, expected, CALLS * outputs * sizeof(float)) == 0;
    printf("%ld threads: %s\n", threads, same ? "same" : "DIFFERENT");
    if (!same) return 1;
    lstm_ext_stream_destroy(stream);
    free(y);
    if (threads > 1) free(results);
  }
  lstm_ext_model_destroy(model);
  free(x);
  free(expected);
  return 0;
}
