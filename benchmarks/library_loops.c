/* One step after the other, as a program in C has them: with the C library, and as people write the layer in C. For
 * bench_library.py, which loads this with ctypes. The seconds of each step are written to `seconds`. */
#define _POSIX_C_SOURCE 199309L
#include <lstm_ext.h>
#include <math.h>
#include <time.h>

static double now(void) {
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

const char* library_steps(lstm_ext_stream* stream, const float* x, float* y, long steps, double* seconds) {
  for (long i = 0; i < steps; ++i) {
    const double begin = now();
    const char* const error = lstm_ext_step(stream, x, y);
    seconds[i] = now() - begin;
    if (error) return error;
  }
  return 0;
}

static float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

/* The weights are those of torch: w (4 n, inputs), u (4 n, n), b (4 n), the gates i, f, g, o one after the other. */
static void plain_step(long inputs, long n, const float* w, const float* u, const float* b, const float* x, float* h,
                       float* c, float* gates) {
  for (long row = 0; row < 4 * n; ++row) {
    float sum = b[row];
    for (long k = 0; k < inputs; ++k) sum += w[row * inputs + k] * x[k];
    for (long k = 0; k < n; ++k) sum += u[row * n + k] * h[k];
    gates[row] = sum;
  }
  for (long j = 0; j < n; ++j) {
    c[j] = sigmoid(gates[n + j]) * c[j] + sigmoid(gates[j]) * tanhf(gates[2 * n + j]);
    h[j] = sigmoid(gates[3 * n + j]) * tanhf(c[j]);
  }
}

void plain_steps(long inputs, long n, const float* w, const float* u, const float* b, const float* x, float* h,
                 float* c, float* gates, long steps, double* seconds) {
  for (long i = 0; i < steps; ++i) {
    const double begin = now();
    plain_step(inputs, n, w, u, b, x, h, c, gates);
    seconds[i] = now() - begin;
  }
}
