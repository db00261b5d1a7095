#include "torch/parallel.h"

#include <ATen/Parallel.h>

#if !defined(_OPENMP)
#error "compile with -fopenmp: without it everything would run on one thread and say nothing"
#endif
#include <omp.h>

namespace lstm_ext {

int available_threads() { return at::in_parallel_region() || omp_in_parallel() ? 1 : at::get_num_threads(); }

bool run_at_once(int workers, void (*work)(void* context, int index), void* context) {
  if (workers == 1) {
    work(context, 0);
    return true;
  }
  bool complete = false;
#pragma omp parallel num_threads(workers)
  {
    // All threads see the same number, so all agree.
    if (omp_get_num_threads() == workers) {
      if (omp_get_thread_num() == 0) complete = true;
      work(context, omp_get_thread_num());
    }
  }
  return complete;
}

}  // namespace lstm_ext
