// Streams of the C library: states and workspace. A stream plans its calls as csrc/torch/cpu_layer.cpp does, and has
// the memory of all plans from the beginning.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#define LSTM_EXT_ISA_SOFTWARE  // the barrier has no registers
#include "cpu/barrier.h"
#include "cpu/kernels.h"
#include "library/memory.h"
#include "library/model.h"

using Barrier = lstm_ext::cpu::LSTM_EXT_ISA::Barrier;

struct lstm_ext_stream {
  const lstm_ext_model* model;
  int64_t batch, max_steps;
  int threads;
  bool allocated;
  void *h, *c;
  int64_t state_bytes;  // both, one after the other
  void* between[2];     // the outputs of a layer, which the next one reads, in turn
  // The workspace of each direction. Barriers end where it begins, and never become anything else: a plan with more of
  // them begins before one with fewer.
  char* workspaces[2];
  Barrier* meeting;                          // all threads
  mutable int failed;                        // a worker waited too long, so the barriers are out of step
  lstm_ext::cpu::ForwardPlan step_plans[2];  // one step, of the first layer and of the others
};

namespace lstm_ext::library {
namespace {

constexpr int64_t kMostBatch = 1 << 20, kMostSteps = 1 << 20, kMostThreads = 256;
constexpr int64_t kMostBytes = int64_t{1} << 46;

LayerShape layer_shape(const lstm_ext_model& model, int64_t layer) {
  return WeightsFile{nullptr, &model.header}.shape(layer);
}

// A call of one direction of a layer, but for its sequences and states.
template <typename T>
ForwardParams<T> params_of(const lstm_ext_model& model, int64_t layer, int64_t d, int64_t batch, int64_t steps) {
  const Direction<T>& direction = model.direction<T>(layer, d);
  ForwardParams<T> params{};
  params.shape = layer_shape(model, layer);
  params.shape.steps = steps;
  params.shape.batch = batch;
  params.shape.reverse = d == 1;
  params.options = direction.options;
  params.bf16_parts = static_cast<int>(model.header.bf16_parts);
  params.frozen = &direction.weights;
  return params;
}

template <typename T>
cpu::ForwardPlan plan_of(const lstm_ext_model& model, int64_t layer, int64_t batch, int64_t steps, int threads) {
  const cpu::Kernels<T>& kernels = cpu::kernels_of<T>(*model.capability);
  return kernels.plan_forward(params_of<T>(model, layer, 0, batch, steps), {kernels.lanes, threads, kernels.engine});
}

const char* check_setup(const lstm_ext_model* model, const lstm_ext_setup* setup) {
  if (!model) return failure("model: expected one, got NULL");
  if (!setup) return failure("setup: expected one, got NULL");
  const struct {
    const char* name;
    int64_t value, most;
  } fields[] = {
      {"batch", setup->batch, kMostBatch},
      {"max_steps", setup->max_steps, kMostSteps},
      {"threads", setup->threads, kMostThreads},
  };
  for (const auto& field : fields) {
    if (field.value < 1 || field.value > field.most) {
      return failure("setup: expected %s to be 1 to %lld, got %lld", field.name, static_cast<long long>(field.most),
                     static_cast<long long>(field.value));
    }
  }
  const FileHeader& h = model->header;
  const uint64_t widest = std::max({h.input_size, 4 * h.hidden_size, h.directions * h.output_size});
  const double bytes = 8.0 * static_cast<double>(widest) * static_cast<double>(setup->batch) *
                       std::max(static_cast<double>(setup->max_steps), static_cast<double>(h.num_layers * 2));
  if (bytes > static_cast<double>(kMostBytes)) {
    return failure("setup: batch %lld and max_steps %lld are too large for this model",
                   static_cast<long long>(setup->batch), static_cast<long long>(setup->max_steps));
  }
  double seconds = 0;
  return cpu::lstm_ext_cpu_library()->wait_limit(&seconds);
}

// All layers after the first are alike.
int64_t kinds_of_layers(const lstm_ext_model& model) { return std::min<int64_t>(2, model.header.num_layers); }

// The largest workspace that a direction needs for any number of steps.
struct Workspace {
  int64_t barrier_bytes = 0, other_bytes = 0;
};
Workspace workspace_of(const lstm_ext_model& model, const lstm_ext_setup& setup) {
  return with_type(model.float64(), [&](auto type) {
    Workspace most;
    for (int64_t layer = 0; layer < kinds_of_layers(model); ++layer) {
      for (int64_t steps = 1; steps <= setup.max_steps; ++steps) {
        const cpu::ForwardPlan plan =
            plan_of<decltype(type)>(model, layer, setup.batch, steps, static_cast<int>(setup.threads));
        most.barrier_bytes = std::max(most.barrier_bytes, plan.barrier_bytes);
        most.other_bytes = std::max(most.other_bytes, plan.workspace_bytes - plan.barrier_bytes);
      }
    }
    return most;
  });
}

// Lays a stream out and, where the arena has memory, makes it there.
template <typename T>
lstm_ext_stream* make_stream(const lstm_ext_model& model, const lstm_ext_setup& setup, const Workspace& size,
                             Arena& arena) {
  const FileHeader& h = model.header;
  const int threads = static_cast<int>(setup.threads);
  auto* const stream = arena.take<lstm_ext_stream>(1);
  lstm_ext_stream made{};
  made.model = &model;
  made.batch = setup.batch;
  made.max_steps = setup.max_steps;
  made.threads = threads;
  made.meeting = arena.take<Barrier>(1);
  const int64_t sets = int64_t{h.num_layers} * h.directions * setup.batch;
  const int64_t before = arena.used;
  made.h = arena.take<T>(sets * static_cast<int64_t>(h.output_size));
  made.c = arena.take<T>(sets * static_cast<int64_t>(h.hidden_size));
  made.state_bytes = arena.used - before;
  const auto outputs = static_cast<int64_t>(h.directions * h.output_size);
  for (int64_t i = 0; i < std::min<int64_t>(2, h.num_layers - 1); ++i) {
    made.between[i] = arena.take<T>(setup.max_steps * setup.batch * outputs);
  }
  // With one thread, the directions take turns in one workspace.
  char* workspace = nullptr;
  for (int64_t d = 0; d < h.directions; ++d) {
    if (d == 0 || threads > 1) workspace = arena.take<char>(size.barrier_bytes + size.other_bytes);
    made.workspaces[d] = workspace ? workspace + size.barrier_bytes : nullptr;
  }
  for (int64_t layer = 0; layer < kinds_of_layers(model); ++layer) {
    made.step_plans[layer] = plan_of<T>(model, layer, setup.batch, 1, threads);
  }
  if (!stream) return nullptr;
  std::memset(arena.base, 0, static_cast<size_t>(arena.used));  // barriers, states; and every page is there
  return new (stream) lstm_ext_stream(made);
}

lstm_ext_stream* build_stream(const lstm_ext_model& model, const lstm_ext_setup& setup, const Workspace& size,
                              Arena& arena) {
  return with_type(model.float64(), [&](auto type) { return make_stream<decltype(type)>(model, setup, size, arena); });
}

// Checks the setup, and finds the bytes of a stream.
const char* plan_stream(const lstm_ext_model* model, const lstm_ext_setup* setup, Workspace& size, int64_t* bytes) {
  if (const char* const error = check_setup(model, setup)) return error;
  size = workspace_of(*model, *setup);
  Arena arena;
  build_stream(*model, *setup, size, arena);
  *bytes = arena.used;
  return nullptr;
}

void meet(const lstm_ext_stream& stream) {
  if (stream.threads > 1) stream.meeting->wait(static_cast<uint32_t>(stream.threads));
}

// A worker's part of a layer.
template <typename T>
void run_layer(const lstm_ext_stream& stream, const cpu::ForwardPlan& plan, int64_t layer, const T* x, int64_t steps,
               T* y, int worker) {
  const lstm_ext_model& model = *stream.model;
  const cpu::Kernels<T>& kernels = cpu::kernels_of<T>(*model.capability);
  const int64_t B = stream.batch, D = model.header.directions;
  for (int64_t d = 0; d < D; ++d) {
    // At once, the second direction has the workers after those of the first.
    const int mine = plan.directions_at_once ? worker - static_cast<int>(d) * plan.grid.workers() : worker;
    if (mine < 0 || mine >= plan.grid.workers()) continue;
    ForwardParams<T> params = params_of<T>(model, layer, d, B, steps);
    const LayerShape& shape = params.shape;
    const int64_t set = layer * D + d, P = shape.output_size, H = shape.hidden_size, outputs = D * P;
    params.input = {x, B * shape.input_size, shape.input_size};
    params.output = {y + d * P, B * outputs, outputs};
    // A state is read before it is replaced: see forward.h.
    params.h_n = static_cast<T*>(stream.h) + set * B * P;
    params.c_n = static_cast<T*>(stream.c) + set * B * H;
    params.h0 = params.h_n;
    params.c0 = params.c_n;
    cpu::check(kernels.forward(params, plan, stream.workspaces[d] - plan.barrier_bytes, mine));
  }
}

// A worker's part of all layers. `plans`: of the first one, and of the others.
template <typename T>
void run_layers(const lstm_ext_stream& stream, const cpu::ForwardPlan* plans, const void* x, int64_t steps, void* y,
                int worker) {
  const int64_t layers = stream.model->header.num_layers;
  const auto* input = static_cast<const T*>(x);
  for (int64_t layer = 0; layer < layers; ++layer) {
    T* const output = static_cast<T*>(layer + 1 < layers ? stream.between[layer % 2] : y);
    meet(stream);
    run_layer<T>(stream, plans[layer > 0], layer, input, steps, output, worker);
    input = output;
  }
  meet(stream);
}

template <typename T>
void run_all(const lstm_ext_stream& stream, const void* x, int64_t steps, void* y, int worker) {
  if (steps == 1) return run_layers<T>(stream, stream.step_plans, x, steps, y, worker);
  cpu::ForwardPlan plans[2];
  for (int64_t layer = 0; layer < kinds_of_layers(*stream.model); ++layer) {
    plans[layer] = plan_of<T>(*stream.model, layer, stream.batch, steps, stream.threads);
  }
  run_layers<T>(stream, plans, x, steps, y, worker);
}

const char* check_call(const lstm_ext_stream* stream, const void* x, int64_t steps, const void* y, int64_t worker) {
  if (!stream) return failure("stream: expected one, got NULL");
  if (__atomic_load_n(&stream->failed, __ATOMIC_RELAXED)) {
    return failure("stream: a worker waited longer than LSTM_EXT_CPU_WAIT_LIMIT allows: expected another stream");
  }
  if (!x || !y) return failure("%s: expected an array, got NULL", x ? "y" : "x");
  if (steps < 1 || steps > stream->max_steps) {
    return failure("steps: expected 1 to %lld, got %lld", static_cast<long long>(stream->max_steps),
                   static_cast<long long>(steps));
  }
  if (worker < 0 || worker >= stream->threads) {
    return failure("worker: expected 0 to %d, got %lld", stream->threads - 1, static_cast<long long>(worker));
  }
  const FileHeader& h = stream->model->header;
  const auto numbers = static_cast<uintptr_t>(steps * stream->batch) * (h.float64 != 0 ? 8 : 4);
  const auto input = reinterpret_cast<uintptr_t>(x), output = reinterpret_cast<uintptr_t>(y);
  if (input < output + numbers * h.directions * h.output_size && output < input + numbers * h.input_size) {
    return failure("x and y: expected arrays that do not overlap, got %p and %p", x, y);
  }
  return nullptr;
}

const char* check_alone(const lstm_ext_stream* stream, const char* instead) {
  if (!stream || stream->threads == 1) return nullptr;
  return failure("stream: expected one of 1 thread, got one of %d, each of which calls %s", stream->threads, instead);
}

const char* run_part(const lstm_ext_stream* stream, const void* x, int64_t steps, void* y, int64_t worker) {
  if (const char* const error = check_call(stream, x, steps, y, worker)) return error;
  const char* const error = cpu::error_of([&] {
    with_type(stream->model->float64(),
              [&](auto type) { run_all<decltype(type)>(*stream, x, steps, y, static_cast<int>(worker)); });
  });
  if (error) __atomic_store_n(&stream->failed, 1, __ATOMIC_RELAXED);
  return error;
}

const char* step_part(const lstm_ext_stream* stream, const void* x, void* y, int64_t worker) {
  if (stream && stream->model->header.directions == 2) {
    return failure("stream: a model of two directions has no single steps, since one of them needs the future");
  }
  return run_part(stream, x, 1, y, worker);
}

}  // namespace
}  // namespace lstm_ext::library

using namespace lstm_ext::library;

const char* lstm_ext_stream_create(const lstm_ext_model* model, const lstm_ext_setup* setup, lstm_ext_stream** stream) {
  if (!stream) return failure("stream: expected a place for it, got NULL");
  Workspace size;
  int64_t bytes = 0;
  if (const char* const error = plan_stream(model, setup, size, &bytes)) return error;
  Arena arena{static_cast<char*>(allocated(bytes))};
  if (!arena.base) return no_memory(bytes);
  *stream = build_stream(*model, *setup, size, arena);
  (*stream)->allocated = true;
  return nullptr;
}

const char* lstm_ext_stream_size(const lstm_ext_model* model, const lstm_ext_setup* setup, size_t* needed) {
  if (!needed) return failure("needed: expected a place for it, got NULL");
  Workspace size;
  int64_t bytes = 0;
  if (const char* const error = plan_stream(model, setup, size, &bytes)) return error;
  *needed = static_cast<size_t>(bytes + kAlignment);
  return nullptr;
}

const char* lstm_ext_stream_create_in(const lstm_ext_model* model, const lstm_ext_setup* setup, void* memory,
                                      size_t memory_size, lstm_ext_stream** stream) {
  if (!stream) return failure("stream: expected a place for it, got NULL");
  Workspace size;
  int64_t bytes = 0;
  if (const char* const error = plan_stream(model, setup, size, &bytes)) return error;
  const auto needed = static_cast<size_t>(bytes + kAlignment);
  if (!memory || memory_size < needed) return little_memory(needed, memory ? memory_size : 0);
  Arena arena{aligned(memory)};
  *stream = build_stream(*model, *setup, size, arena);
  return nullptr;
}

void lstm_ext_stream_destroy(lstm_ext_stream* stream) {
  if (stream && stream->allocated) std::free(stream);
}

void* lstm_ext_stream_h(lstm_ext_stream* stream) { return stream ? stream->h : nullptr; }
void* lstm_ext_stream_c(lstm_ext_stream* stream) { return stream ? stream->c : nullptr; }

const char* lstm_ext_stream_reset(lstm_ext_stream* stream) {
  if (!stream) return failure("stream: expected one, got NULL");
  std::memset(stream->h, 0, static_cast<size_t>(stream->state_bytes));
  return nullptr;
}

const char* lstm_ext_step(lstm_ext_stream* stream, const void* x, void* y) {
  const char* const error = check_alone(stream, "lstm_ext_step_part");
  return error ? error : step_part(stream, x, y, 0);
}
const char* lstm_ext_run(lstm_ext_stream* stream, const void* x, int64_t steps, void* y) {
  const char* const error = check_alone(stream, "lstm_ext_run_part");
  return error ? error : run_part(stream, x, steps, y, 0);
}
const char* lstm_ext_step_part(lstm_ext_stream* stream, const void* x, void* y, int64_t worker) {
  return step_part(stream, x, y, worker);
}
const char* lstm_ext_run_part(lstm_ext_stream* stream, const void* x, int64_t steps, void* y, int64_t worker) {
  return run_part(stream, x, steps, y, worker);
}
