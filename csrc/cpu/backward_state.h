// The state of a backward pass, which its loop, steps and products share.
#pragma once

#include "cpu/isa.h"

#include "cpu/cell.h"
#include "cpu/column_product.h"
#include "cpu/gates.h"
#include "cpu/pass.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

// The steps first ... first + count - 1 of the time loop, at the times begin ... begin + count - 1, and their buffers,
// which are kept in order of time until the products over the chunk.
template <typename T>
struct Chunk {
  int64_t first = 0, count = 0, begin = 0, rows = 0;
  // Gradients of the preactivations. With layer normalisation dL/d(U h) and dL/d(W x); else both pointers are the same.
  T* grad_preactivations = nullptr;
  T* grad_input_part = nullptr;
  T* grad_hidden = nullptr;  // with a projection: dL/dh_t of the projected h_t
  T* masked_h = nullptr;     // with recurrent dropout: h_{t-1} times its mask
  T* hidden = nullptr;       // recomputed o * tanh(c_t), else null
};

// The arrays that the cells of one step read and write, each from row 0 of the batch on.
template <typename T>
struct BackwardStepRows {
  const T* gate_values;
  const T* cells;
  const T* grad_output;       // or null
  const T* grad_cells;        // or null
  const T* grad_gate_values;  // or null
  T* grad_preactivations;
  T* grad_input_part;
  int64_t place;  // first row of the step in arrays (T, B, n)
  bool odd;       // whether the step's number is odd
  PreviousStates<T> previous;
};

template <typename T>
struct BackwardState;

// The arrays that the cells of some rows of the team read and write in a step, each from the first of these rows and
// unit 0 on. It is held by value, because beside the tile engine each access to memory counts.
template <typename T>
struct CellRows {
  int64_t hidden_size, step, grad_step;  // row strides: of c, and of the gradients of the preactivations
  const T* gate_values;                  // rows of 4H; the others are of H
  const T* cells;
  const T* previous_cells;    // c_{t-1}; null means zeros
  const T* carried;           // dL/dc_t from the step after, or from c_n; null means zeros
  const T* grad_cells;        // or null
  const T* grad_gate_values;  // or null
  T* grad_c;
  T* grad_preactivations;
  int64_t place;                  // index of the first row in arrays (T, B, H)
  const BackwardState<T>* mixed;  // null if the previous states of all rows are of one kind
  int64_t first, batch_step;      // index of the first row in the batch, and the rows' stride

  LSTM_EXT_INLINE int64_t batch_row(int64_t row) const { return first + row * batch_step; }
  LSTM_EXT_INLINE const T* previous_row(int64_t row) const {
    if (mixed) return mixed->step.previous.c_row(batch_row(row));
    return previous_cells ? previous_cells + row * step : nullptr;
  }
  LSTM_EXT_INLINE Reg<T> carried_gradient(int64_t row, int64_t unit, int lanes) const {
    return carried ? load_lanes<T>(carried + row * step + unit, lanes) : Simd<T>::zero();
  }
  // Adds the gradient of c_t that the caller gave, if c_t is a result of the layer.
  LSTM_EXT_INLINE void add_result_gradient(Reg<T>& grad, int64_t row, int64_t unit, int lanes) const {
    if (grad_cells) grad = grad + load_lanes<T>(grad_cells + row * step + unit, lanes);
  }

  // Backward through c_t, from dL/dc_t, dL/do and the cell's values.
  template <typename Math, typename Cell>
  LSTM_EXT_INLINE cell::Backward<Math> through_state(int64_t row, int64_t unit, int lanes, const Gates<T>& gates,
                                                     Reg<T> c_previous, Reg<T> c, Reg<T> grad, Reg<T> grad_o,
                                                     const Cell& cell) const {
    const GivenGradients<T> given{grad_gate_values ? grad_gate_values + row * 4 * step + unit : nullptr, hidden_size,
                                  lanes};
    return cell::state_backward<Math>(gates, c_previous, c, grad, grad_o, given, cell);
  }

  // The backward pass of `lanes` units of a row, from dL/dh before the projection: stores the gradients of the
  // preactivations and carries dL/dc on. `options` is null for a plain layer. `sums`, (H) for each parameter of
  // the cell, is null without them.
  template <bool kOptions>
  LSTM_EXT_INLINE void cell_gradient(int64_t row, int64_t unit, Reg<T> grad_h, int lanes,
                                     const StepOptions<T>* options = nullptr, T* sums = nullptr) const {
    const int64_t H = hidden_size, at = row * step + unit;
    const Gates<T> gates = load_gates<T>(gate_values + row * 4 * step + unit, H, lanes);
    const T* const previous = previous_row(row);
    const Reg<T> c_previous = previous ? load_lanes<T>(previous + unit, lanes) : Simd<T>::zero();
    // h_t sees c_t before zoneout, which is not saved.
    Reg<T> c = load_lanes<T>(cells + at, lanes);
    if (kOptions && options->zoneout_c.active()) {
      c = cell_state<T>(gates, {{previous ? previous + unit : nullptr}, lanes}, {options->cell, {unit, lanes}});
    }
    Reg<T> grad = carried_gradient(row, unit, lanes);
    Reg<T> previous_part = Simd<T>::zero();
    if constexpr (kOptions) {
      add_result_gradient(grad, row, unit, lanes);  // the zoneout of c applies to it too
      if (options->zoneout_c.active()) {
        const auto split = split_gradient<T>({options->zoneout_c, (place + row * batch_step) * H + unit, lanes}, grad);
        grad = split.fresh;
        previous_part = split.previous;
      }
    }
    using Math = OwnDivisions<T>;
    const auto cell = [&]() LSTM_EXT_LAMBDA_INLINE {
      if constexpr (kOptions) {
        return CellAt<T>{options->cell, {unit, lanes}};
      } else {
        return cell::Plain{};
      }
    }();
    const Reg<T> grad_o = cell::output_backward<Math>(gates[kO], c, grad_h, grad, cell);
    if (!kOptions) add_result_gradient(grad, row, unit, lanes);
    const auto grads = through_state<Math>(row, unit, lanes, gates, c_previous, c, grad, grad_o, cell);
    if (kOptions && sums) {
      for (int n = 0; n < cell::kParameters; ++n) {
        add_lanes<T>(sums + n * H + unit, cell::parameter_term<Math>(n, grads.dz, c_previous, c), lanes);
      }
    }
    T* const out = grad_preactivations + row * grad_step + unit;
    T* const running = grad_c + at;
    const BackwardState<T>* const state = mixed;  // read before the stores
    store_gates<T>(out, grads.dz, H, lanes);
    store_lanes<T>(running, kOptions ? grads.dc_before + previous_part : grads.dc_before, lanes);
    if (state) state->cut_if_reset(batch_row(row), unit, lanes, running, out);
  }
};

template <typename T>
struct BackwardState : Pass<T, BackwardParams<T>, BackwardPlan> {
  using Base = Pass<T, BackwardParams<T>, BackwardPlan>;
  using Base::columns, Base::mine, Base::part, Base::part_or_null, Base::rows, Base::rows_in, Base::states_before;
  using Base::kLanes, Base::params, Base::plan, Base::shape, Base::steps, Base::zero_row;
  using S = Simd<T>;

  const bool recomputes = !params.gate_values;
  const int64_t gate_stride = plan.gate_stride;
  const Range hidden_columns = columns(shape.hidden_size);  // the units of this member
  const Range output_columns = columns(shape.output_size);  // its output features; the same without a projection
  // h_{t-1} of the chunk's rows; see list_previous_h.
  const T** const h_rows = Base::template mine<const T*>(plan.h_lists);
  // The rows of the gradients of the preactivations of the team, for a step after which one of them is cut off.
  const T** const cut_rows = Base::template mine<const T*>(plan.cut_lists);
  T* const outer_products = mine(plan.outer_products);
  // Buffers (B, n); null where they are not needed.
  T* const grad_h = part_or_null(plan.grad_h);  // (B, H): dL/d(o * tanh(c)) of a step
  // (B, P): the part of dL/dh_t that zoneout gives to h_{t-1}.
  T* const grad_previous_h = part_or_null(plan.grad_previous_h);
  // Sums over the steps before which a row is reset: of the gradients of the preactivations, and of grad_previous_h.
  // One product of the first sum with U gives dL/dh of the state that replaced the row's.
  T* const reset_grad_preactivations = part_or_null(plan.reset_grad_preactivations);
  T* const reset_grad_previous_h = part_or_null(plan.reset_grad_previous_h);
  Chunk<T> chunk{}, earlier_chunk{};
  BackwardStepRows<T> step{};

  BackwardState(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace, int worker)
      : Base(params, plan, Steps::Pass::kBackward, workspace, worker) {}

  // Begins a chunk at step `first`, with as many steps as a buffer has rows for. Several workers alternate between two
  // buffers. One worker uses the same buffer again, because it is still in cache.
  void begin_chunk(int64_t first) {
    earlier_chunk = chunk;
    Chunk<T> c;
    c.first = first;
    while (first + c.count < shape.steps && c.rows + steps.rows_in(first + c.count) <= plan.chunk_rows) {
      c.rows += steps.rows_in(first + c.count++);
    }
    c.begin = shape.reverse ? first : shape.steps - first - c.count;
    const bool was_even = first > 0 && earlier_chunk.grad_preactivations == part(plan.grad_preactivations);
    const int64_t buffer = was_even == can_share_buffer(c) ? 0 : 1;
    c.grad_preactivations = part(plan.grad_preactivations, buffer);
    c.grad_input_part = plan.grad_input_part.is_needed() ? part(plan.grad_input_part, buffer) : c.grad_preactivations;
    c.grad_hidden = part(plan.grad_hidden, buffer);
    c.masked_h = part_or_null(plan.masked_h, buffer);
    c.hidden = part_or_null(plan.recomputed_hidden, buffer);
    chunk = c;
  }

  // Whether the new chunk can use the buffer of the earlier one: its first step writes while it still reads the rows of
  // the step before.
  bool can_share_buffer(const Chunk<T>& c) const {
    if (plan.grid.workers() > 1 || c.first == 0) return false;
    const int64_t read = row_in_chunk(earlier_chunk, c.first - 1), written = row_in_chunk(c, c.first);
    return read + steps.rows_in(c.first - 1) <= written || written + steps.rows_in(c.first) <= read;
  }

  // The row of its chunk at which step s begins. The chunk is the current one or the earlier one.
  int64_t row_in_chunk(const Chunk<T>& c, int64_t s) const {
    return steps.rows_before(steps.time(s)) - steps.rows_before(c.begin);
  }
  int64_t row_in_chunk(int64_t s) const { return row_in_chunk(chunk, s); }
  T* grad_preactivations(int64_t s) const {
    const Chunk<T>& c = s >= chunk.first ? chunk : earlier_chunk;
    return c.grad_preactivations + row_in_chunk(c, s) * gate_stride;
  }
  T* grad_hidden(int64_t s) const { return chunk.grad_hidden + row_in_chunk(s) * shape.output_size; }
  // The recomputed gate values of a row of the current chunk.
  T* recomputed_gate_values(int64_t row) const {
    return part(plan.recomputed_gate_values) + row * 4 * shape.hidden_size;
  }

  // Makes step s of the chunk the current one.
  void begin_step(int64_t s) {
    const int64_t H = shape.hidden_size;
    const int64_t t = steps.time(s);
    const int64_t place = steps.rows_before(t);
    step.gate_values = recomputes ? recomputed_gate_values(row_in_chunk(s)) : params.gate_values + place * 4 * H;
    step.cells = params.cells + place * H;
    step.grad_output = params.grad_output.data ? rows_at(params.grad_output, steps, t) : nullptr;
    step.grad_cells = params.grad_cells ? params.grad_cells + place * H : nullptr;
    step.grad_gate_values = params.grad_gate_values ? params.grad_gate_values + place * 4 * H : nullptr;
    step.grad_preactivations = grad_preactivations(s);
    step.grad_input_part = chunk.grad_input_part + row_in_chunk(s) * gate_stride;
    step.place = place;
    step.odd = s % 2 != 0;
    step.previous = states_before(t);
  }

  // A (depth, columns) weight, packed according to the plan.
  RightHandSide<T> right_hand_side(const WeightRows<T>& matrix, int64_t columns, int64_t depth,
                                   const PackedWeight& packed) const {
    static_assert(kBlockK <= kSumBlock);  // outer_products has room for a panel
    if (packed.bf16_parts > 0) {
      return {matrix, nullptr, columns, depth, outer_products, false, Base::bf16_operand(packed), Base::tile_scratch()};
    }
    return {matrix, Base::panels(packed), columns, depth, outer_products};
  }
  // The rows of W and of U.
  const int64_t weight_rows = (Base::gru() ? 3 : 4) * shape.hidden_size;
  RightHandSide<T> recurrent_weight() const {
    RightHandSide<T> weight = right_hand_side(Base::weight_hh(), shape.output_size, weight_rows, plan.recurrent);
    weight.backwards = step.odd;
    return weight;
  }
  RightHandSide<T> projection_weight() const {
    return right_hand_side({params.weights.weight_hr}, shape.hidden_size, shape.output_size, plan.projection);
  }
  // The rows of W whose gradients lie side by side, in rows of the gradients of all gates. Those of a GRU are two
  // pieces.
  struct Piece {
    int64_t first, count, gradient;
  };
  Piece input_piece(int number) const {
    const int64_t H = shape.hidden_size;
    if (!Base::gru()) return {0, 4 * H, 0};
    return number == 0 ? Piece{0, 2 * H, 0} : Piece{2 * H, H, cell::kGruInput * H};
  }
  const int input_pieces = Base::gru() ? 2 : 1;
  RightHandSide<T> input_weight(const Piece& piece) const {
    const int64_t I = shape.input_size;
    RightHandSide<T> weight = right_hand_side(Base::weight_ih().from(piece.first * I), I, piece.count, plan.input);
    if (weight.panels) weight.panels += piece.first * divide_up(I, kLanes) * kLanes;
    return weight;
  }

  // The team's own buffer for partial sums, wide enough for both products of a step (P <= H).
  RowGrid<T> partial_sums(Range part) const {
    return rows.grid(Base::part(plan.partial_sums), shape.hidden_size, part);
  }

  // The gradients of the preactivations of step `later`, for rows of the team, as the step before it reads them: a row
  // is zeros if a reset cut the state between the two. No rows if `later` is -1.
  RowGrid<const T> later_grad_preactivations(int64_t later, Range part) const {
    if (later < 0) return {};
    RowGrid<const T> grads = rows.grid(const_cast<const T*>(grad_preactivations(later)), gate_stride, part);
    const ResetFlags resets = steps.resets_before(steps.time(later));
    if (rows.any(resets, part)) {
      for (int64_t row = 0; row < part.end - part.begin; ++row) {
        const bool cut = resets[rows.batch_row(part.begin + row)];
        cut_rows[row] = cut ? zero_row : grads.data + row * grads.inner_step;
      }
      grads.list = cut_rows;
    }
    return grads;
  }

  // Fills h_rows with pointers to h_{t-1} of every row of the chunk.
  void list_previous_h() const {
    int64_t n = 0;
    for (int64_t t = chunk.begin; t < chunk.begin + chunk.count; ++t) {
      const PreviousStates<T> previous = states_before(t);
      for (int64_t b = 0; b < steps.rows_at(t); ++b, ++n) {
        const T* const h = previous.h_row(b);
        h_rows[n] = h ? h : zero_row;
      }
    }
  }

  // The cells of these rows in the current step. `begins`: it is the first step of the loop for these rows.
  CellRows<T> cell_rows(Range part, bool begins) const {
    const int64_t H = shape.hidden_size, first = rows.batch_row(part.begin), at = first * H;
    const auto row = [](auto* data, int64_t offset) { return data ? data + offset : nullptr; };
    const PreviousStates<T>& previous = step.previous;
    const int64_t last = rows.batch_row(part.end - 1);
    const bool continue_all = last < previous.continued, begin_all = first >= previous.continued;
    return {H,
            rows.stride * H,
            rows.stride * gate_stride,
            step.gate_values + 4 * at,
            step.cells + at,
            row(continue_all ? previous.c : previous.c0, at),
            row(begins ? params.grad_c_n : params.grad_c, at),
            row(step.grad_cells, at),
            row(step.grad_gate_values, 4 * at),
            params.grad_c + at,
            step.grad_preactivations + first * gate_stride,
            step.place + first,
            !previous.resets.any() && (continue_all || begin_all) ? nullptr : this,
            first,
            rows.stride};
  }

  // If the row was reset before the step, its gradients belong to the state that replaced it.
  __attribute__((noinline)) void cut_if_reset(int64_t b, int64_t unit, int lanes, T* grad_c,
                                              const T* grad_preactivations) const {
    if (step.previous.resets[b]) cut_gradient(b, unit, lanes, grad_c, grad_preactivations);
  }
  void cut_gradient(int64_t b, int64_t unit, int lanes, T* grad_c, const T* grad_preactivations) const {
    const int64_t H = shape.hidden_size;
    const auto add = [&](T* sum, const T* term)
                         LSTM_EXT_LAMBDA_INLINE { add_lanes<T>(sum, load_lanes<T>(term, lanes), lanes); };
    if (params.grad_reset_c) add(params.grad_reset_c + b * H + unit, grad_c);
    store_lanes<T>(grad_c, S::zero(), lanes);
    if (!reset_grad_preactivations) return;
    for (int gate = 0; gate < kGates; ++gate) {
      add(reset_grad_preactivations + b * gate_stride + gate * H + unit, grad_preactivations + gate * H);
    }
  }

  // Clears the sums of resets. Each member clears its own units of the team's rows.
  void zero_reset_sums() const {
    if (!params.grad_reset_c && !reset_grad_preactivations) return;
    const int64_t H = shape.hidden_size;
    const auto zero = [](T* row, Range part) {
      for (int64_t k = part.begin; k < part.end; ++k) row[k] = T(0);
    };
    for (int64_t row = 0; row < rows.most; ++row) {
      const int64_t b = rows.batch_row(row);
      if (params.grad_reset_c) zero(params.grad_reset_c + b * H, hidden_columns);
      for (int gate = 0; gate < kGates && reset_grad_preactivations; ++gate) {
        zero(reset_grad_preactivations + b * gate_stride + gate * H, hidden_columns);
      }
      if (reset_grad_previous_h) {
        zero(reset_grad_previous_h + b * shape.output_size, output_columns);
      }
    }
  }
  void finish_reset_sums() const {
    if (!reset_grad_preactivations) return;
    const Range part{0, rows.most};
    const T* const mask = params.options.recurrent_mask;
    multiply_columns(rows.grid(const_cast<const T*>(reset_grad_preactivations), gate_stride, part), rows.most,
                     recurrent_weight(), output_columns, partial_sums(part), kNoPrefetch, kFromZero<T>,
                     [&](int64_t row, int64_t column, Reg<T> sum, int lanes) LSTM_EXT_LAMBDA_INLINE {
                       const int64_t at = rows.batch_row(row) * shape.output_size + column;
                       if (mask) sum = sum * load_lanes<T>(mask + at, lanes);
                       if (reset_grad_previous_h) sum = sum + load_lanes<T>(reset_grad_previous_h + at, lanes);
                       store_lanes<T>(params.grad_reset_h + at, sum, lanes);
                     });
  }
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
