// One time step of the forward pass, fused or unfused; `Forward` runs one of them, chosen once a call.
//
// The fused step never writes its sums to memory: it adds the input part to a tile of U h_{t-1} and computes the cells
// in registers. It supports no options. The unfused step writes its sums to memory, and a second pass does the rest.
#pragma once

#include "cpu/isa.h"

#include "cpu/cell.h"
#include "cpu/forward_state.h"
#include "cpu/gates.h"
#include "cpu/layer_norm.h"
#include "cpu/pass.h"
#include "cpu/range.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace lstm_ext::cpu::LSTM_EXT_ISA {
namespace {

template <typename T>
class FusedForwardStep {
 public:
  explicit FusedForwardStep(ForwardState<T>& pass) : pass_(pass) {}

  // The start value of the input part, and the work that follows it for the rows of a chunk.
  const T* input_bias() const { return pass_.bias; }
  void finish_input_part(int64_t, const RowGrid<T>&) {}

  void run(int64_t s, const RowGrid<T>& preactivations) {
    const int64_t t = pass_.steps.time(s);
    const int64_t count = preactivations.rows;
    const PreviousStates<T> previous = pass_.states_before(t, pass_.params.c_n);
    const int64_t continued = pass_.rows.count(previous.continued);
    for_each_part(continued, count, [&](Range part, bool begins) LSTM_EXT_LAMBDA_INLINE {
      recurrence(t, part, begins, previous, preactivations);
    });
    pass_.meet_team();
    if (pass_.shape.projected) {
      pass_.project(t, count);
      pass_.meet_team();
    }
  }

 private:
  static constexpr int kLanes = Simd<T>::kLanes;

  // The cells of a step. A product calls it with the sums of a tile. It holds all pointers by value: it runs once a
  // row, where each indirection costs time.
  struct Cells {
    // c_{t-1} and c_t have the same row stride, or the rows of c_{t-1} are listed. Null means zeros.
    const T* c_from;
    const T* const* c_rows;
    T* c_to;
    int64_t c_step;
    EvenRows<T> h_to, gates;
    int64_t hidden_size;
    bool saves_gates;

    struct Place {
      int64_t row, unit;
    };

    // Beside the tile engine a cell cannot wait for the second-level cache. The product itself prefetches `pre`. Cells
    // of four rows at once run beside no product, and gain nothing from this.
    LSTM_EXT_INLINE void prefetch(int64_t row, int64_t unit) const {
      const int64_t at = row * c_step + unit;
      __builtin_prefetch((c_from ? c_from : c_to) + at);
      __builtin_prefetch(c_to + at, 1);
      __builtin_prefetch(h_to(row) + unit, 1);
    }

    // Computes kCount cells at once, of several rows or of two blocks of units, because each is a long chain of
    // dependent instructions. sums(n, gate) are the sums of places[n].
    template <int kCount, typename Sums>
    LSTM_EXT_INLINE void make(const Place (&places)[kCount], int lanes, const Sums& sums) const {
      using All = Several<T, kCount>;
      PreviousCells<T, kCount> previous{{}, lanes};
      int there = 0;
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        previous.at[n] = c_before(places[n]);
        there += previous.at[n] != nullptr;
      }
      if constexpr (kCount > 1) {
        if (__builtin_expect(there % kCount != 0, 0)) {  // some of the rows begin here
#pragma GCC unroll 4
          for (int n = 0; n < kCount; ++n) {
            make<1>({places[n]}, lanes, [&](int, int gate) LSTM_EXT_LAMBDA_INLINE { return sums(n, gate); });
          }
          return;
        }
      }
      Gates<All> preactivations;
#pragma GCC unroll kGates
      for (int gate = 0; gate < kGates; ++gate) {
        preactivations[gate] = several<T, kCount>([&](int n) LSTM_EXT_LAMBDA_INLINE { return sums(n, gate); });
      }
      const auto cell = cell::forward<SharedDivisions<All>>(
          preactivations, previous, cell::Plain{}, [&](const Reg<All>& c) LSTM_EXT_LAMBDA_INLINE {
#pragma GCC unroll 4
            for (int n = 0; n < kCount; ++n) {
              store_lanes<T>(c_to + places[n].row * c_step + places[n].unit, one_of<kCount>(c, n), lanes);
            }
          });
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        store_lanes<T>(h_to(places[n].row) + places[n].unit, one_of<kCount>(cell.h, n), lanes);
      }
      if (!saves_gates) return;
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) {
        const auto gate = [&](int i) LSTM_EXT_LAMBDA_INLINE { return one_of<kCount>(cell.gates[i], n); };
        const Gates<T> values{{gate(kI), gate(kF), gate(kG), gate(kO)}};
        store_gates<T>(gates(places[n].row) + places[n].unit, values, hidden_size, lanes);
      }
    }

    // Computes the rows of a tile from kFirst on: four at once, else two, else one. With 16 registers always one.
    template <int kFirst, int R>
    LSTM_EXT_INLINE void make_rows(int64_t row, int64_t unit, int lanes, const Tile<T, R, kGates>& tile) const {
      constexpr int kLeft = R - kFirst, kCount = kVectorRegisters == 16 || kLeft == 1 ? 1 : kLeft < 4 ? 2 : 4;
      Place places[kCount];
#pragma GCC unroll 4
      for (int n = 0; n < kCount; ++n) places[n] = {row + kFirst + n, unit};
      make<kCount>(places, lanes, [&](int n, int gate) LSTM_EXT_LAMBDA_INLINE { return tile.acc[kFirst + n][gate]; });
      if constexpr (kLeft > kCount) make_rows<kFirst + kCount>(row, unit, lanes, tile);
    }

    template <int R>
    LSTM_EXT_INLINE bool operator()(int64_t row, int64_t unit, int lanes, const Tile<T, R, kGates>& tile) const {
      make_rows<0>(row, unit, lanes, tile);
      return true;
    }
    LSTM_EXT_INLINE bool operator()(int64_t row, int64_t unit, int lanes, const BlockPair<T>& pair) const {
      const auto& sums = pair.tile.acc;
      if constexpr (kVectorRegisters == 32) {
        if (lanes == pair.second_lanes) {
          make<2>({{row, unit}, {row, pair.second_unit}}, lanes,
                  [&](int n, int gate) LSTM_EXT_LAMBDA_INLINE { return sums[n][gate]; });
          return true;
        }
      }
      make<1>({{row, unit}}, lanes, [&](int, int gate) LSTM_EXT_LAMBDA_INLINE { return sums[0][gate]; });
      make<1>({{row, pair.second_unit}}, pair.second_lanes,
              [&](int, int gate) LSTM_EXT_LAMBDA_INLINE { return sums[1][gate]; });
      return true;
    }

   private:
    LSTM_EXT_INLINE const T* c_before(const Place& place) const {
      const T* const from = c_rows ? c_rows[place.row] : c_from;
      return !from ? nullptr : c_rows ? from + place.unit : from + place.row * c_step + place.unit;
    }
  };

  // preactivations += U h_{t-1}, and W x_t + b unless the chunk summed it, then the cells. The rows of the team in
  // `part` all continue or all begin.
  void recurrence(int64_t t, Range part, bool begins, const PreviousStates<T>& previous,
                  const RowGrid<T>& preactivations) {
    const ForwardParams<T>& params = pass_.params;
    const int64_t H = pass_.shape.hidden_size;
    const int64_t P = pass_.shape.output_size;
    const int64_t count = part.end - part.begin;
    RowGrid<const T> h =
        begins ? pass_.rows.grid(previous.h0, P, part) : pass_.rows.grid(previous.h, previous.h_step, part);
    const RowGrid<const T> c_previous = pass_.rows.grid(begins ? previous.c0 : previous.c, H, part);
    int64_t h_size = h.data ? P : 0;
    const bool replaced = pass_.rows.any(previous.resets, part);
    if (replaced) {
      pass_.list_previous(previous, part);
      h = listed_rows<const T>(pass_.h_rows);
      h_size = P;
    }
    const RowGrid<T> c = pass_.cells(t, part);
    const RowGrid<T> hidden = pass_.hidden(t, part);
    RowGrid<T> pre = preactivations;
    pre.data = preactivations(part.begin);

    const Cells cells{c_previous.data,
                      replaced ? pass_.c_rows : nullptr,
                      c.data,
                      c.inner_step,
                      {hidden.data, hidden.inner_step},
                      {pre.data, pre.inner_step},
                      H,
                      params.gate_values != nullptr};
    const auto input = [&] {
      const Sequence<const T>& x = params.input;
      return pass_.rows.grid(rows_at(x, pass_.steps, t), x.stride_b, part);
    };
    const int64_t I = pass_.shape.input_size, groups = pass_.plan.unit_groups;
    for (int64_t group = 0; group < groups; ++group) {
      Range blocks = pass_.blocks;
      if (groups > 1) {
        const Range mine = share(blocks.end - blocks.begin, groups, pass_.forwards ? group : groups - 1 - group);
        blocks = {blocks.begin + mine.begin, blocks.begin + mine.end};
        GateProduct<T>(H, blocks, {}, pass_.forwards).multiply(count, input(), I, pass_.input_weight, pre, pass_.bias);
      }
      GateProduct<T> product_of_group(H, blocks, {}, pass_.forwards);
      GateProduct<T>& product = groups > 1 ? product_of_group : pass_.product;
      if (pass_.recurrent_weight.packed()) {
        OtherProduct<T> other;
        const T* bias = nullptr;
        if (pass_.plan.input_in_steps) {
          other = {input(), I, &pass_.input_weight};
          bias = pass_.bias;
        }
        product.multiply_packed(count, h, h_size, pass_.recurrent_weight, cells.gates, bias, cells, other);
        continue;
      }
      const bool finished =
          h_size > 0 && product.multiply_unpacked(count, h, h_size, pass_.recurrent_weight, pre, nullptr, cells);
      if (finished) continue;
      for (int64_t row = 0; row < count; ++row) {
        const T* const sums = pre(row);
        int64_t block = blocks.begin;
        if constexpr (kVectorRegisters == 32) {
          for (; (block + 2) * kLanes <= H && block + 2 <= blocks.end; block += 2) {
            const int64_t unit = block * kLanes, next = unit + kLanes;
            cells.template make<2>({{row, unit}, {row, next}}, kLanes, [&](int n, int gate) LSTM_EXT_LAMBDA_INLINE {
              return Simd<T>::load(sums + (n == 0 ? unit : next) + gate * H);
            });
          }
        }
        for (; block < blocks.end; ++block) {
          const int64_t unit = block * kLanes;
          const int lanes = product.lanes_in(block);
          cells.template make<1>({{row, unit}}, lanes, [&](int, int gate) LSTM_EXT_LAMBDA_INLINE {
            return load_lanes<T>(sums + unit + gate * H, lanes);
          });
        }
      }
    }
  }

  ForwardState<T>& pass_;
};

// The step with options. A member computes the cells of its own units. With layer normalisation, which needs the
// statistics of whole rows, it computes its share of the team's rows.
template <typename T, bool kNormalised>
class UnfusedForwardStep {
 public:
  explicit UnfusedForwardStep(ForwardState<T>& pass)
      : pass_(pass),
        options_(pass.params.options),
        masked_h_(pass.mine(pass.plan.masked_h)),
        recurrent_part_(pass.part(pass.plan.recurrent_parts, pass.team)),
        normalised_c_(pass.mine(pass.plan.normalised_cells)) {}

  // With layer normalisation the cell adds the biases.
  const T* input_bias() const { return kNormalised ? pass_.zero_row : pass_.bias; }

  // Normalises the chunk's W x; the members of the team share the rows.
  void finish_input_part(int64_t count, const RowGrid<T>& products) {
    if constexpr (!kNormalised) return;
    pass_.meet_team();
    const ForwardParams<T>& params = pass_.params;
    for_each_norm_group(pass_.member_share(count), [&](Range group) {
      T* rows[kNormRows];
      T factors[kNormRows];
      for (int64_t n = group.begin; n < group.end; ++n) rows[n - group.begin] = products(n);
      normalise<T>(rows, group.end - group.begin, 4 * H_, factors);
      for (int64_t r = 0; r < group.end - group.begin && params.norm_input; ++r) {
        params.norm_factors[(rows[r] - params.norm_input) / (4 * H_) * 2] = factors[r];
      }
    });
  }

  void run(int64_t s, const RowGrid<T>& preactivations) {
    const int64_t t = pass_.steps.time(s);
    const int64_t count = preactivations.rows;
    pass_.list_previous(pass_.states_before(t, pass_.params.c_n), {0, count});
    first_row_ = pass_.steps.rows_before(t);
    input_part_ = preactivations;
    recurrent_ = recurrent_part(count);
    cells_ = pass_.cells(t, {0, count});
    hidden_ = pass_.hidden(t, {0, count});
    multiply_recurrent(count);
    if constexpr (kNormalised) {
      pass_.meet_team();
      for_each_norm_group(pass_.member_share(count), [&](Range group) { normalised_cells(group); });
    } else {
      for (int64_t row = 0; row < count; ++row) cell_row(row, pass_.blocks, nullptr);
    }
    pass_.meet_team();
    if (pass_.shape.projected) {
      pass_.project(t, count);
      if (options_.zoneout_h.active()) keep_part_of_output(t, count);
      pass_.meet_team();
    }
  }

 private:
  using S = Simd<T>;
  static constexpr int kLanes = S::kLanes;

  // The index of a row of the team in arrays (T, B, n), in this step.
  int64_t place(int64_t row) const { return first_row_ + pass_.rows.batch_row(row); }
  T* gate_row(int64_t row) const {
    T* const all = pass_.params.gate_values;
    return all ? all + place(row) * 4 * H_ : input_part_(row);
  }

  // The buffer of U h_{t-1}: the preactivations, or, with layer normalisation, a buffer of its own.
  RowGrid<T> recurrent_part(int64_t count) const {
    if constexpr (!kNormalised) return input_part_;
    T* const all = pass_.params.norm_recurrent;
    if (all) return pass_.rows.grid(all + first_row_ * 4 * H_, 4 * H_, {0, count});
    return {recurrent_part_, count * 4 * H_, 4 * H_, count};
  }

  void multiply_recurrent(int64_t count) {
    const int64_t P = pass_.shape.output_size;
    RowGrid<const T> h = listed_rows<const T>(pass_.h_rows);
    if (options_.recurrent_mask) {
      for (int64_t row = 0; row < count; ++row) {
        const T* const mask = options_.recurrent_mask + pass_.rows.batch_row(row) * P;
        for_each_register<T>(P, [&](int64_t k, int lanes) LSTM_EXT_LAMBDA_INLINE {
          const Reg<T> unmasked = load_lanes<T>(pass_.h_rows[row] + k, lanes);
          store_lanes<T>(masked_h_ + row * P + k, unmasked * load_lanes<T>(mask + k, lanes), lanes);
        });
      }
      h = {masked_h_, count * P, P, count};
    }
    pass_.product.multiply(count, h, P, pass_.recurrent_weight, recurrent_, kNormalised ? pass_.zero_row : nullptr);
  }

  // Computes c_t of some units of a row and, without layer normalisation, o * tanh(c_t). With it, c_t before zoneout is
  // written to `unnormalised_c`.
  LSTM_EXT_INLINE void cell_row(int64_t row, Range blocks, T* unnormalised_c) {
    const LayerNorm<T>& norm = options_.norm;
    const T* const input_row = input_part_(row);
    const T* const recurrent_row = recurrent_(row);
    T* const gates_row = gate_row(row);
    const T* const previous = pass_.c_rows[row];
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int64_t unit = block * kLanes;
      const int lanes = pass_.product.lanes_in(block);
      Gates<T> sums = load_gates<T>(input_row + unit, H_, lanes);
      if constexpr (kNormalised) {
#pragma GCC unroll kGates
        for (int gate = 0; gate < kGates; ++gate) {
          const int64_t at = gate * H_ + unit;
          sums[gate] =
              S::fma(load_lanes<T>(norm.gain_ih + at, lanes), sums[gate], load_lanes<T>(pass_.bias + at, lanes));
          sums[gate] =
              S::fma(load_lanes<T>(norm.gain_hh + at, lanes), load_lanes<T>(recurrent_row + at, lanes), sums[gate]);
        }
      }
      using Math = OwnDivisions<T, kNormalised ? Exactness::kPrecise : Exactness::kUsual>;
      const PreviousCells<T> before{{previous ? previous + unit : nullptr}, lanes};
      const auto cell = cell::forward<Math>(sums, before, CellAt<T>{options_.cell, {unit, lanes}});
      if (!kNormalised || !norm.carries) store_cell(row, unit, lanes, previous, cell.c);
      if (kNormalised || pass_.params.gate_values) store_gates<T>(gates_row + unit, cell.gates, H_, lanes);
      if constexpr (kNormalised) {
        store_lanes<T>(unnormalised_c + unit, cell.c, lanes);
      } else {
        store_hidden(row, unit, lanes, cell.h);
      }
    }
  }

  LSTM_EXT_INLINE void store_cell(int64_t row, int64_t unit, int lanes, const T* previous, Reg<T> c) {
    if (options_.zoneout_c.active()) {
      const Reg<T> old_c = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
      c = kept_state<T>({options_.zoneout_c, place(row) * H_ + unit, lanes}, c, old_c);
    }
    store_lanes<T>(cells_(row) + unit, c, lanes);
  }

  LSTM_EXT_INLINE void store_hidden(int64_t row, int64_t unit, int lanes, Reg<T> h) {
    if (options_.zoneout_h.active() && !pass_.shape.projected) {
      const Reg<T> old_h = load_lanes<T>(pass_.h_rows[row] + unit, lanes);
      h = kept_state<T>({options_.zoneout_h, place(row) * H_ + unit, lanes}, h, old_h);
    }
    store_lanes<T>(hidden_(row) + unit, h, lanes);
  }

  // Computes the cells of at most kNormRows rows, from normalised products to o * tanh of the normalised c_t.
  void normalised_cells(Range group) {
    const LayerNorm<T>& norm = options_.norm;
    const int64_t count = group.end - group.begin;
    T* recurrent[kNormRows];
    T* c[kNormRows];
    T factors[kNormRows];
    for (int64_t r = 0; r < count; ++r) {
      recurrent[r] = recurrent_(group.begin + r);
      c[r] = normalised_c_ + r * H_;
    }
    normalise<T>(recurrent, count, 4 * H_, factors);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = group.begin + r;
      if (pass_.params.norm_factors) pass_.params.norm_factors[place(row) * 2 + 1] = factors[r];
      cell_row(row, Range{0, divide_up(H_, kLanes)}, c[r]);
    }
    normalise<T>(c, count, H_, factors);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = group.begin + r;
      const T* const gates_row = gate_row(row);
      for_each_register<T>(H_, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
        const Reg<T> shift = norm.bias_c ? load_lanes<T>(norm.bias_c + unit, lanes) : S::zero();
        const Reg<T> tanh_input =
            S::fma(load_lanes<T>(norm.gain_c + unit, lanes), load_lanes<T>(c[r] + unit, lanes), shift);
        if (norm.carries) store_cell(row, unit, lanes, pass_.c_rows[row], tanh_input);
        const Reg<T> o = load_lanes<T>(gates_row + kO * H_ + unit, lanes);
        const CellAt<T> cell{options_.cell, {unit, lanes}};
        store_hidden(row, unit, lanes, cell::hidden<PreciseDivisions<T>>(o, tanh_input, cell));
      });
    }
  }

  // Applies zoneout to the projected h_t, for the output columns that `project` gives this member.
  void keep_part_of_output(int64_t t, int64_t count) {
    const int64_t P = pass_.shape.output_size;
    const RowGrid<T> output = pass_.output(t, {0, count});
    const Range mine = pass_.columns(P);
    for (int64_t row = 0; row < count; ++row) {
      T* const h = output(row);
      for (int64_t k = mine.begin; k < mine.end; k += kLanes) {
        const int lanes = static_cast<int>(smaller(mine.end - k, kLanes));
        const Reg<T> old_h = load_lanes<T>(pass_.h_rows[row] + k, lanes);
        const ZoneoutAt<T> zoneout{options_.zoneout_h, place(row) * P + k, lanes};
        store_lanes<T>(h + k, kept_state<T>(zoneout, load_lanes<T>(h + k, lanes), old_h), lanes);
      }
    }
  }

  ForwardState<T>& pass_;
  const StepOptions<T>& options_;
  const int64_t H_ = pass_.shape.hidden_size;
  T* const masked_h_;        // masked h_{t-1} of the team's rows
  T* const recurrent_part_;  // their U h_{t-1}, unless it is saved
  T* const normalised_c_;    // kNormRows rows of the normalised c_t
  // In this step: the index of its first row in arrays (T, B, n), and the team's rows.
  int64_t first_row_ = 0;
  RowGrid<T> input_part_{}, recurrent_{}, cells_{}, hidden_{};
};

}  // namespace
}  // namespace lstm_ext::cpu::LSTM_EXT_ISA
