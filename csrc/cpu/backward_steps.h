// One time step of the backward pass, fused or unfused, as in the forward pass. `Backward` runs one of them, chosen
// once a call.
//
// The fused step computes tiles of dL/dh_t = dL/d(output) + dL/d(preactivations of t + 1) U; the epilogue of a tile
// computes the cells. It supports no options. The unfused step writes dL/dh_t to memory, and a second pass computes the
// cells.
#pragma once

#include "cpu/isa.h"

#include "cpu/backward_state.h"
#include "cpu/cell.h"
#include "cpu/column_product.h"
#include "cpu/gates.h"
#include "cpu/layer_norm.h"
#include "cpu/pass.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
class FusedBackwardStep {
 public:
  explicit FusedBackwardStep(BackwardState<T>& pass) : pass_(pass) {}

  void begin() {}
  void finish_chunk() {}
  void finish() {}

  // The sequences of the rows from `continued` on end here, so these rows begin in this step of the loop.
  void run(int64_t s, int64_t count, int64_t continued) {
    const bool projected = pass_.shape.projected;
    const int64_t P = pass_.shape.output_size;
    const int64_t t = pass_.steps.time(s);
    for_each_part(continued, count, [&](Range part, bool begins) LSTM_EXT_LAMBDA_INLINE {
      const int64_t later = begins ? -1 : s - 1;
      const T* const grad_h_n = begins ? pass_.params.grad_h_n : nullptr;
      if (!projected) {
        const CellRows<T> cells = pass_.cell_rows(part, begins);
        hidden_gradient(part, later, grad_h_n, t, prefetch_of(cells, part),
                        [=](int64_t row, int64_t column, Reg<T> sums, int lanes)
                            LSTM_EXT_LAMBDA_INLINE { cells.template cell_gradient<false>(row, column, sums, lanes); });
      } else {
        const RowGrid<T> out = pass_.rows.grid(pass_.grad_hidden(s), P, part);
        hidden_gradient(part, later, grad_h_n, t, kNoPrefetch, StoreRows{out});
      }
    });
    if (projected) {
      pass_.meet_team();
      const T* const grad_hidden = pass_.grad_hidden(s);
      for_each_part(continued, count, [&](Range part, bool begins) LSTM_EXT_LAMBDA_INLINE {
        const CellRows<T> cells = pass_.cell_rows(part, begins);
        multiply_columns(pass_.rows.grid(grad_hidden, P, part), part.end - part.begin, pass_.projection_weight(),
                         pass_.hidden_columns, pass_.partial_sums(part), prefetch_of(cells, part), kFromZero<T>,
                         [=](int64_t row, int64_t column, Reg<T> sums, int lanes)
                             LSTM_EXT_LAMBDA_INLINE { cells.template cell_gradient<false>(row, column, sums, lanes); });
      });
    }
    pass_.meet_team();
  }

  // Computes dL/dh0 of rows whose sequence had its first step in step `later`.
  void initial_state_gradient(Range part, int64_t later) {
    const RowGrid<T> out = pass_.rows.grid(pass_.params.grad_h0, pass_.shape.output_size, part);
    hidden_gradient(part, later, nullptr, -1, kNoPrefetch, StoreRows{out});
  }

 private:
  using S = Simd<T>;

  struct StoreRows {
    RowGrid<T> out;
    LSTM_EXT_INLINE void operator()(int64_t row, int64_t column, Reg<T> sums, int lanes) const {
      store_lanes<T>(out(row) + column, sums, lanes);
    }
  };

  // dL/dh for some of the team's rows and this member's columns. It sums the gradient of the output at time t (if t >=
  // 0), that of h_n (if given) and the recurrent product of step `later` (if >= 0).
  template <typename Prefetch, typename Finish>
  LSTM_EXT_INLINE void hidden_gradient(Range part, int64_t later, const T* grad_h_n, int64_t t,
                                       const Prefetch& prefetch, const Finish& finish) {
    const Sequence<const T>& sequence = pass_.params.grad_output;
    const bool from_output = t >= 0 && sequence.data;
    const RowGrid<const T> grad_output =
        pass_.rows.grid(from_output ? rows_at(sequence, pass_.steps, t) : nullptr, sequence.stride_b, part);
    const RowGrid<const T> grad_final = pass_.rows.grid(grad_h_n, pass_.shape.output_size, part);
    const auto start = [=](int64_t row, int64_t column, int lanes, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE {
      v = grad_output.data ? load_lanes<T>(grad_output.data + row * grad_output.inner_step + column, lanes) : S::zero();
      if (grad_final.data) v = v + load_lanes<T>(grad_final.data + row * grad_final.inner_step + column, lanes);
    };
    RightHandSide<T> weight = pass_.recurrent_weight();
    if (later < 0) weight.depth = 0;
    const RowGrid<const T> grads = pass_.later_grad_preactivations(later, part);
    multiply_columns(grads, part.end - part.begin, weight, pass_.output_columns, pass_.partial_sums(part), prefetch,
                     start, finish);
  }

  // Prefetches the data that the cells of some rows read.
  auto prefetch_of(const CellRows<T>& cells, Range part) const {
    const int64_t H = cells.hidden_size, step = cells.step;
    const T* const c = cells.cells;
    const T* const previous = cells.previous_cells ? cells.previous_cells : c;
    const bool has_output = pass_.step.grad_output && !pass_.shape.projected;
    const RowGrid<const T> grads =
        has_output ? pass_.rows.grid(pass_.step.grad_output, pass_.params.grad_output.stride_b, part)
                   : RowGrid<const T>{c, 0, step, 0};
    const T* const output = grads.data;
    const int64_t output_step = grads.inner_step;
    return [=, gate_values = cells.gate_values](int64_t row, int64_t unit) LSTM_EXT_LAMBDA_INLINE {
      const T* const gates = gate_values + row * 4 * step + unit;
#pragma GCC unroll kGates
      for (int gate = 0; gate < kGates; ++gate) __builtin_prefetch(gates + gate * H);
      const int64_t at = row * step + unit;
      __builtin_prefetch(c + at);
      __builtin_prefetch(previous + at);
      __builtin_prefetch(output + row * output_step + unit);
    };
  }

  BackwardState<T>& pass_;
};

// The first part of an unfused step: writes dL/d(o * tanh(c_t)) to pass.grad_h.
template <typename T>
class UnfusedHiddenGradient {
 public:
  explicit UnfusedHiddenGradient(BackwardState<T>& pass) : pass_(pass), options_(pass.params.options) {}

  void run(int64_t s, int64_t count, int64_t continued) {
    if (continued > 0) output_gradient(s, Range{0, continued}, false);
    if (continued < count) output_gradient(s, Range{continued, count}, true);
    if (!pass_.shape.projected) return;
    pass_.meet_team();
    const RowGrid<const T> a =
        pass_.rows.grid(const_cast<const T*>(pass_.grad_hidden(s)), pass_.shape.output_size, {0, count});
    const RowGrid<T> out = pass_.rows.grid(pass_.grad_h, pass_.shape.hidden_size, {0, count});
    multiply_columns(a, count, pass_.projection_weight(), pass_.hidden_columns, pass_.partial_sums({0, count}),
                     kNoPrefetch, kFromZero<T>,
                     [&](int64_t row, int64_t column, Reg<T> sums, int lanes)
                         LSTM_EXT_LAMBDA_INLINE { store_lanes<T>(out(row) + column, sums, lanes); });
  }

  // Computes dL/dh0 of rows whose sequence had its first step in step `later`.
  void initial_state(Range part, int64_t later) {
    recurrent_product(part, later, [&](int64_t b, int64_t column, Reg<T> v, int lanes) {
      const int64_t at = b * pass_.shape.output_size + column;
      if (pass_.grad_previous_h) v = v + load_lanes<T>(pass_.grad_previous_h + at, lanes);
      store_lanes<T>(pass_.params.grad_h0 + at, v, lanes);
    });
  }

 private:
  using S = Simd<T>;

  // dL/dh_{t-1} through U and the mask of recurrent dropout, from step `later`; zeros if `later` < 0. Covers some of
  // the team's rows and this member's columns; calls finish(batch row, column, values, lanes).
  template <typename Finish>
  void recurrent_product(Range part, int64_t later, Finish&& finish) {
    RightHandSide<T> weight = pass_.recurrent_weight();
    if (later < 0) weight.depth = 0;
    const RowGrid<const T> grads = pass_.later_grad_preactivations(later, part);
    multiply_columns(grads, part.end - part.begin, weight, pass_.output_columns, pass_.partial_sums(part), kNoPrefetch,
                     kFromZero<T>, [&](int64_t row, int64_t column, Reg<T> v, int lanes) LSTM_EXT_LAMBDA_INLINE {
                       const int64_t b = pass_.rows.batch_row(part.begin + row);
                       if (options_.recurrent_mask) {
                         const int64_t at = b * pass_.shape.output_size + column;
                         v = v * load_lanes<T>(options_.recurrent_mask + at, lanes);
                       }
                       finish(b, column, v, lanes);
                     });
  }

  // dL/dh_t before zoneout, for rows of step s. `begins`: whether the rows begin there in this loop.
  void output_gradient(int64_t s, Range part, bool begins) {
    const BackwardParams<T>& params = pass_.params;
    const BackwardStepRows<T>& step = pass_.step;
    const int64_t P = pass_.shape.output_size;
    T* const out = pass_.shape.projected ? pass_.grad_hidden(s) : pass_.grad_h;
    recurrent_product(part, begins ? -1 : s - 1, [&](int64_t b, int64_t column, Reg<T> v, int lanes) {
      const int64_t at = b * P + column;
      if (step.grad_output) v = v + load_lanes<T>(step.grad_output + b * params.grad_output.stride_b + column, lanes);
      if (begins && params.grad_h_n) v = v + load_lanes<T>(params.grad_h_n + at, lanes);
      if (pass_.grad_previous_h) {
        T* const running = pass_.grad_previous_h + at;
        if (!begins) v = v + load_lanes<T>(running, lanes);
        const auto split = split_gradient<T>({options_.zoneout_h, step.place * P + at, lanes}, v);
        v = split.fresh;
        Reg<T> previous_part = split.previous;
        if (step.previous.resets[b]) {
          if (pass_.reset_grad_previous_h) add_lanes<T>(pass_.reset_grad_previous_h + at, previous_part, lanes);
          previous_part = S::zero();
        }
        store_lanes<T>(running, previous_part, lanes);
      }
      store_lanes<T>(out + at, v, lanes);
    });
  }

  BackwardState<T>& pass_;
  const StepOptions<T>& options_;
};

// The step with options. A member computes the cells of its own units. With layer normalisation it computes whole rows,
// and the members share the team's rows.
template <typename T, bool kNormalised>
class UnfusedBackwardStep {
 public:
  explicit UnfusedBackwardStep(BackwardState<T>& pass) : pass_(pass), options_(pass.params.options) {}

  void begin() {
    if (!chunk_sums_) return;
    zero_rows(chunk_sums_, sums_size_, Range{0, 1});
    zero_rows(worker_sums_, sums_size_, Range{0, 1});
  }

  void run(int64_t s, int64_t count, int64_t continued) {
    hidden_gradient_.run(s, count, continued);
    if constexpr (kNormalised) {
      pass_.meet_team();
      for_each_norm_group(pass_.member_share(count), [&](Range group) {
        T factors[kNormRows];
        normalise_cells(group, factors);
        for (int64_t row = group.begin; row < group.end; ++row) {
          const int64_t r = row - group.begin;
          normalised_cell_gradient(row, row >= continued, normalised_c_ + r * H_, factors[r]);
        }
      });
    } else {
      const Range units = pass_.hidden_columns;
      for_each_part(continued, count, [&](Range part, bool begins) LSTM_EXT_LAMBDA_INLINE {
        const CellRows<T> cells = pass_.cell_rows(part, begins);
        for (int64_t row = 0; row < part.end - part.begin; ++row) {
          const T* const grad_h = pass_.grad_h + cells.batch_row(row) * H_;
          for (int64_t unit = units.begin; unit < units.end; unit += S::kLanes) {
            const int lanes = static_cast<int>(smaller(units.end - unit, S::kLanes));
            cells.template cell_gradient<true>(row, unit, load_lanes<T>(grad_h + unit, lanes), lanes, &options_,
                                               chunk_sums_);
          }
        }
      });
    }
    pass_.meet_team();
  }

  void initial_state_gradient(Range part, int64_t later) { hidden_gradient_.initial_state(part, later); }

  // Adds the chunk's sums to the total. One running sum over all rows would be less exact.
  void finish_chunk() {
    for (int64_t k = 0; k < sums_size_; ++k) {
      worker_sums_[k] += chunk_sums_[k];
      chunk_sums_[k] = T(0);
    }
  }

  // Adds up the workers' sums, each worker a share of them. All workers have passed a barrier after their last chunk.
  void finish() {
    const BackwardParams<T>& params = pass_.params;
    if constexpr (kNormalised) {
      T* const grads[] = {params.grad_bias, params.grad_gain_ih, params.grad_gain_hh, params.grad_gain_c,
                          params.grad_bias_c};
      const int64_t sizes[] = {4, 4, 4, 1, 1};
      add_up(grads, sizes);
    } else if (chunk_sums_) {
      const int64_t sizes[] = {1, 1, 1};
      add_up(params.grad_cell, sizes);
    }
  }

 private:
  using S = Simd<T>;

  // The gradients that the sums are, one after the other; null where not requested. `sizes` are in H.
  template <int kCount>
  void add_up(T* const (&grads)[kCount], const int64_t (&sizes)[kCount]) const {
    const int64_t workers = pass_.plan.grid.workers();
    const Range mine = share(sums_size_, workers, pass_.worker);
    int64_t begin = 0;
    for (int n = 0; n < kCount; ++n) {
      const int64_t end = begin + sizes[n] * H_;
      for (int64_t k = mine.begin > begin ? mine.begin : begin; grads[n] && k < smaller(mine.end, end); ++k) {
        T sum = 0;
        for (int64_t worker = 0; worker < workers; ++worker) sum += all_sums_[worker * sums_size_ + k];
        grads[n][k - begin] = sum;
      }
      begin = end;
    }
  }

  // Computes N(c_t), the normalised c_t, of at most kNormRows rows.
  void normalise_cells(Range group, T* factors) {
    T* normalised[kNormRows];
    for (int64_t row = group.begin; row < group.end; ++row) {
      const int64_t b = pass_.rows.batch_row(row);
      const T* const previous = pass_.step.previous.c_row(b);
      const T* const gate_row = pass_.step.gate_values + b * 4 * H_;
      T* const out = normalised[row - group.begin] = normalised_c_ + (row - group.begin) * H_;
      for_each_register<T>(H_, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
        const Gates<T> gates = load_gates<T>(gate_row + unit, H_, lanes);
        const PreviousCells<T> before{{previous ? previous + unit : nullptr}, lanes};
        store_lanes<T>(out + unit, cell_state<T>(gates, before, {options_.cell, {unit, lanes}}), lanes);
      });
    }
    normalise<T>(normalised, group.end - group.begin, H_, factors);
  }

  // The gradient through a normalisation y = N(x) = (x - mean) * r is dx = r * (dy - mean(dy) - y * mean(dy * y)).
  // These are the two sums over a row, spread over lanes.
  struct NormGradient {
    Reg<T> total = S::zero(), weighted = S::zero();
    LSTM_EXT_INLINE NormGradient() {}  // the compiler's own would be compiled for another target
    LSTM_EXT_INLINE void add(Reg<T> grad, Reg<T> y) {
      total = total + grad;
      weighted = S::fma(grad, y, weighted);
    }
    // From sums to means, in each lane.
    LSTM_EXT_INLINE void divide(int64_t numbers) {
      const Reg<T> count = S::set1(static_cast<T>(numbers));
      total = sum_of_lanes<T>(total) / count;
      weighted = sum_of_lanes<T>(weighted) / count;
    }
    LSTM_EXT_INLINE Reg<T> of(Reg<T> grad, Reg<T> y) const { return grad - total - y * weighted; }
  };

  // A row of the current step.
  struct NormRow {
    int64_t b, place;  // in the batch, and in arrays (T, B, n)
    const T* gate_values;
    const T* normalised;  // N(c_t)
    T factor;             // its r
    // For W x, then for U h: the normalised products, their r, and the gradients.
    const T* products[2];
    const T* factors;
    T* grads[2];
  };

  // Like cell_gradient, for a whole row, and through its three normalisations.
  void normalised_cell_gradient(int64_t row, bool begins, const T* normalised, T factor) {
    const BackwardStepRows<T>& step = pass_.step;
    const int64_t b = pass_.rows.batch_row(row), place = step.place + b;
    const NormRow now{b,
                      place,
                      step.gate_values + b * 4 * H_,
                      normalised,
                      factor,
                      {pass_.params.norm_input + place * 4 * H_, pass_.params.norm_recurrent + place * 4 * H_},
                      pass_.params.norm_factors + place * 2,
                      {step.grad_input_part + b * pass_.gate_stride, step.grad_preactivations + b * pass_.gate_stride}};
    const CellRows<T> cells = pass_.cell_rows({row, row + 1}, begins);
    const NormGradient through_c = through_hidden(now, cells);
    through_cell(now, cells, through_c);
    if (!step.previous.resets[b]) return;
    for_each_register<T>(H_, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
      pass_.cut_gradient(b, unit, lanes, pass_.params.grad_c + b * H_ + unit, now.grads[1] + unit);
    });
  }

  // dL/dc_t but for its part through h_t, as zoneout splits it.
  LSTM_EXT_INLINE transition::StateGradient<OwnDivisions<T>> carried_gradient(const NormRow& now,
                                                                              const CellRows<T>& cells, int64_t unit,
                                                                              int lanes) const {
    Reg<T> grad_c = cells.carried_gradient(0, unit, lanes);
    cells.add_result_gradient(grad_c, 0, unit, lanes);
    if (!options_.zoneout_c.active()) return {grad_c, S::zero()};
    return split_gradient<T>({options_.zoneout_c, now.place * H_ + unit, lanes}, grad_c);
  }

  // Backward through h_t = o tanh(gain_c N(c_t) + bias_c): leaves dL/dN(c_t) in grad_normalised_c_, and dL/do where the
  // gradients of the preactivations will be.
  LSTM_EXT_INLINE NormGradient through_hidden(const NormRow& now, const CellRows<T>& cells) {
    using Math = PreciseDivisions<T>;
    const LayerNorm<T>& norm = options_.norm;
    T* const grad_gain_c = chunk_sums_ + 12 * H_;
    T* const grad_bias_c = grad_gain_c + H_;
    NormGradient through_c;
    for_each_register<T>(H_, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
      const Reg<T> y = load_lanes<T>(now.normalised + unit, lanes);
      const Reg<T> gain = load_lanes<T>(norm.gain_c + unit, lanes);
      const Reg<T> shift = norm.bias_c ? load_lanes<T>(norm.bias_c + unit, lanes) : S::zero();
      const Reg<T> o = load_lanes<T>(now.gate_values + kO * H_ + unit, lanes);
      const Reg<T> grad_h = load_lanes<T>(pass_.grad_h + now.b * H_ + unit, lanes);
      Reg<T> grad_tanh_input = norm.carries ? carried_gradient(now, cells, unit, lanes).fresh : S::zero();
      const auto squashed = cell::squash<Math>(S::fma(gain, y, shift), CellAt<T>{options_.cell, {unit, lanes}});
      const Reg<T> grad_o = cell::hidden_backward<Math>(o, squashed, grad_h, grad_tanh_input);
      T* const sum_gain = grad_gain_c + unit;
      store_lanes<T>(sum_gain, S::fma(grad_tanh_input, y, load_lanes<T>(sum_gain, lanes)), lanes);
      add_lanes<T>(grad_bias_c + unit, grad_tanh_input, lanes);
      const Reg<T> grad_y = grad_tanh_input * gain;
      store_lanes<T>(grad_normalised_c_ + unit, grad_y, lanes);
      store_lanes<T>(now.grads[1] + kO * H_ + unit, grad_o, lanes);
      through_c.add(grad_y, y);
    });
    through_c.divide(H_);
    return through_c;
  }

  // Backward through c_t, the gates and their two products.
  LSTM_EXT_INLINE void through_cell(const NormRow& now, const CellRows<T>& cells, const NormGradient& through_c) {
    const T* const gains[] = {options_.norm.gain_ih, options_.norm.gain_hh};
    T* const grad_bias = chunk_sums_;
    T* const grad_gains[] = {grad_bias + 4 * H_, grad_bias + 8 * H_};
    const T* const previous = pass_.step.previous.c_row(now.b);
    const Reg<T> factor_c = S::set1(now.factor);
    NormGradient through[2];
    for_each_register<T>(H_, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
      const Gates<T> gates = load_gates<T>(now.gate_values + unit, H_, lanes);
      const Reg<T> c_previous = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
      const auto carried = carried_gradient(now, cells, unit, lanes);
      const Reg<T> grad_c = S::fma(
          factor_c,
          through_c.of(load_lanes<T>(grad_normalised_c_ + unit, lanes), load_lanes<T>(now.normalised + unit, lanes)),
          options_.norm.carries ? S::zero() : carried.fresh);
      const Reg<T> grad_o = load_lanes<T>(now.grads[1] + kO * H_ + unit, lanes);
      const auto back = cells.template through_state<PreciseDivisions<T>>(
          0, unit, lanes, gates, c_previous, S::zero(), grad_c, grad_o, CellAt<T>{options_.cell, {unit, lanes}});
      store_lanes<T>(pass_.params.grad_c + now.b * H_ + unit, back.dc_before + carried.previous, lanes);
#pragma GCC unroll kGates
      for (int gate = 0; gate < kGates; ++gate) {
        const int64_t at = gate * H_ + unit;
        add_lanes<T>(grad_bias + at, back.dz[gate], lanes);
#pragma GCC unroll 2
        for (int which = 0; which < 2; ++which) {
          const Reg<T> y = load_lanes<T>(now.products[which] + at, lanes);
          add_lanes<T>(grad_gains[which] + at, back.dz[gate] * y, lanes);
          const Reg<T> grad = back.dz[gate] * load_lanes<T>(gains[which] + at, lanes);
          store_lanes<T>(now.grads[which] + at, grad, lanes);
          through[which].add(grad, y);
        }
      }
    });
    for (int which = 0; which < 2; ++which) {
      through[which].divide(4 * H_);
      const Reg<T> scale = S::set1(now.factors[which]);
      T* const grads = now.grads[which];
      for_each_register<T>(4 * H_, [&](int64_t at, int lanes) LSTM_EXT_LAMBDA_INLINE {
        const Reg<T> y = load_lanes<T>(now.products[which] + at, lanes);
        store_lanes<T>(grads + at, through[which].of(load_lanes<T>(grads + at, lanes), y) * scale, lanes);
      });
    }
  }

  BackwardState<T>& pass_;
  const StepOptions<T>& options_;
  UnfusedHiddenGradient<T> hidden_gradient_{pass_};
  const int64_t H_ = pass_.shape.hidden_size;
  // With layer normalisation: kNormRows rows of N(c_t), and one row of its gradient.
  T* const normalised_c_ = pass_.mine(pass_.plan.norm_rows);
  T* const grad_normalised_c_ = normalised_c_ + kNormRows * H_;
  // This worker's sums over a chunk, and over all chunks: with layer normalisation the gradients of the biases (4H),
  // gain_ih (4H), gain_hh (4H), gain_c (H) and bias_c (H); else those of the cell (H) each. Then the sums of all
  // workers.
  const int64_t sums_size_ = pass_.plan.parameter_sums.size;
  T* const chunk_sums_ = pass_.part_or_null(pass_.plan.parameter_sums, pass_.worker);
  T* const all_sums_ = pass_.part(pass_.plan.parameter_sums, pass_.plan.grid.workers());
  T* const worker_sums_ = all_sums_ + pass_.worker * sums_size_;
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
