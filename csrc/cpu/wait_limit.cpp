// A limit for waits at a barrier. The worker that is missing does not come if there is a mistake in the kernels, or if
// its thread was ended: without a limit the others wait for it for ever, and nobody learns where.
#include <unistd.h>

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

struct Limit {
  std::atomic<double> seconds;
  std::atomic<int> file;
};

double wish() {
  const char* const text = std::getenv(kVariable);
  if (!text || !*text) return 0;
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  if (*end != 0 || !(seconds >= 0)) {
    throw std::invalid_argument(std::string(kVariable) + ": expected a number of seconds, got '" + text + "'");
  }
  return seconds;
}

Limit& limit() {
  static Limit value{{wish()}, {STDERR_FILENO}};
  return value;
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
  return error_of([&] { *seconds = limit().seconds; });
}
const char* change_wait_limit(double seconds, int file) {
  return error_of([&] { limit().seconds = seconds, limit().file = file; });
}

void note_wait(Wait& wait, uint32_t barrier, uint32_t arrived, uint32_t workers) {
  if (limit().seconds == 0) return;
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  const double now = static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  if (wait.noted > 0) wait.seconds += std::min(now - wait.noted, kLongestTurn);
  wait.noted = now;
  if (wait.seconds < limit().seconds) return;
  dprintf(
      limit().file,
      "lstm_ext: a worker has waited for %.0f s at barrier %u of its call, which %u of %u workers have reached. The "
      "others do not come: the process ends (%s).\n",
      wait.seconds, barrier, arrived, workers, kVariable);
  std::abort();
}

}  // namespace lstm_ext::cpu
