// How a call is cut up: which path, how many workers, what each owns, where things lie in the
// workspace. Pure functions of shapes and machine facts, so that tests can ask them anything.
#pragma once

#include <cstdint>

#include "contract/params.h"
#include "contract/visibility.h"

namespace lstm_ext::cpu {

// What the plan needs to know of the kernels and of the call.
struct Machine {
  int64_t lanes;         // numbers in a SIMD register
  int64_t element_size;  // bytes
  int threads;           // threads the caller may use
};

// What a call does beyond the plain passes.
struct PlannedExtras {
  bool recurrent_mask = false;
  bool zoneout_h = false;
  bool zoneout_c = false;
  bool norm = false;
  bool rebuild = false;  // the backward pass computes the gates again
  bool change_steps() const { return recurrent_mask || zoneout_h || zoneout_c || norm; }
};

// Workers form a grid: batch_groups teams, each owning a slice of the batch for all time steps, of
// hidden_groups members, each owning a slice of the hidden units of the team's rows. Teams never
// wait for each other inside the time loop, in the backward pass once a chunk; members do, once a
// step (once more with a projection, and with layer normalisation).
// A team's rows lie side by side; of packed data, whose first rows run longest, it has every
// batch_groups-th row, so that all teams have the same to do in every step.
struct WorkerGrid {
  int batch_groups = 1;
  int hidden_groups = 1;
  int workers() const { return batch_groups * hidden_groups; }
};

struct ForwardPlan {
  WorkerGrid grid;
  bool pack_input = false;      // W as gate-interleaved panels; else W is read row-major
  bool pack_recurrent = false;  // the same for U
  int64_t chunk_rows = 0;       // rows (steps x batch rows) of a team whose input part is computed at once
  // Byte offsets into the workspace; barriers come first.
  int64_t input_panels = 0, recurrent_panels = 0, bias = 0, projection_panels = 0, pre_activations = 0, hidden = 0,
          row_lists = 0, state_lists = 0, zero_rows = 0;
  int64_t masked_h = 0, recurrent_parts = 0, visible_cells = 0;  // see forward_extras.h
  int64_t barrier_bytes = 0;
  int64_t workspace_bytes = 0;
};

struct BackwardPlan {
  WorkerGrid grid;
  bool pack = false;  // copy U, W and W_hr into column panels; else read them where they are
  // Rows (steps x batch) of gate gradients that are kept until the products over them are done; whole
  // steps, at least one. Two buffers of so many rows, or one if that is all there is.
  int64_t chunk_rows = 0;
  // Numbers from one row of gate gradients to the next, 4H or a little more: rows at a distance that
  // is a power of two share a few sets of the caches and drive each other out.
  int64_t gate_row = 0;
  int64_t input_panels = 0, recurrent_panels = 0, projection_panels = 0, partial_sums = 0, grad_gates = 0,
          grad_hidden = 0, outer_products = 0, row_lists = 0, zero_rows = 0, state_lists = 0, reset_gates = 0;
  // See backward_buffers.h.
  int64_t grad_h = 0, kept_h = 0, reset_kept_h = 0, masked_h = 0, grad_input_part = 0, norm_rows = 0, norm_sums = 0;
  int64_t rebuilt_gates = 0, rebuilt_hidden = 0, rebuilt_input_panels = 0, rebuilt_recurrent_panels = 0,
          rebuilt_bias = 0, rebuilt_lists = 0;
  int64_t barrier_bytes = 0;
  int64_t workspace_bytes = 0;
};

constexpr int64_t kSumBlock = 512;     // samples whose outer products are summed in registers
constexpr int64_t kTileColumns = 4;    // of a register tile, in registers
constexpr int64_t kNormSums = 14;      // times H: of the gradients of layer normalisation, see backward_buffers.h
constexpr int64_t kNormRows = 4;       // normalised side by side, see step_extras.h
constexpr int64_t kBarrierBytes = 64;  // one cache line each: one for all workers, then one a team

// Numbers of scratch with which a worker adds up the outer products for at most so many rows of a
// weight. Static, since the kernels of each instruction set call it (see kernel_set.h).
static constexpr int64_t outer_product_scratch(int64_t lanes, int64_t rows) {
  return kSumBlock * (kTileColumns * lanes + rows);
}

LSTM_EXT_PUBLIC ForwardPlan plan_forward(const LayerShape& shape, const Machine& machine, bool save,
                                         const PlannedExtras& extras = {});
// `want_grad_reset_h`: that of the state that replaces others.
LSTM_EXT_PUBLIC BackwardPlan plan_backward(const LayerShape& shape, const Machine& machine, bool want_grad_input,
                                           bool want_grad_reset_h = false, const PlannedExtras& extras = {});

}  // namespace lstm_ext::cpu
