// A limit for waits at a barrier. The worker that is missing does not come if there is a mistake in the kernels, or if
// its thread was ended: without a limit the others wait for it for ever, and nobody learns where.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace lstm_ext::cpu {
namespace {

constexpr const char* kVariable = "LSTM_EXT_CPU_WAIT_LIMIT";
// Between two notes a worker gives up its processor 64 times. A process that was stopped meanwhile has not waited.
constexpr double kLongestTurn = 2;
// Workers of one call wait for milliseconds, and longer only if the system runs one of them and not another. The
// workers of a stream of the C library wait for the next call, which may never come.
#if defined(LSTM_EXT_INFERENCE_ONLY)
constexpr double kDefault = 0;
#else
constexpr double kDefault = 300;
#endif

double wish() {
  const char* const text = std::getenv(kVariable);
  if (!text || !*text) return kDefault;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  if (*end != 0 || !(seconds >= 0)) {
    throw std::invalid_argument(std::string(kVariable) + ": expected a number of seconds, got '" + text + "'");
  }
  return seconds;
}

std::atomic<double>& limit() {
  static std::atomic<double> seconds{wish()};
  return seconds;
}

}  // namespace

const char* kept(const char* message) {
  // In turn, and not one for each thread: a library that is loaded late gets little memory for threads.
  static char texts[64][512];
  static std::atomic<unsigned> count{0};
  char (&text)[512] = texts[count.fetch_add(1, std::memory_order_relaxed) % 64];
  std::snprintf(text, sizeof(text), "%s", message);
  return text;
}

const char* read_wait_limit(double* seconds) {
  return error_of([&] { *seconds = limit(); });
}
void change_wait_limit(double seconds) { limit() = seconds; }

void note_wait(Wait& wait, uint32_t barrier, uint32_t arrived, uint32_t workers) {
  const double most = limit();
  if (most == 0) return;
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  const double now = static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  if (wait.noted > 0) wait.seconds += std::min(now - wait.noted, kLongestTurn);
  wait.noted = now;
  if (wait.seconds < most) return;
  char text[256];
  std::snprintf(text, sizeof(text),
                "a worker has waited for %.1f s, longer than %s allows, at barrier %u of its call, which %u of %u "
                "workers have reached: the results mean nothing",
                wait.seconds, kVariable, barrier, arrived, workers);
  throw std::runtime_error(text);
}

}  // namespace lstm_ext::cpu
