// The equations of an LSTM cell, forward and backward. They stand here and nowhere else: the CPU kernels compile them
// for registers of several rows, the CUDA kernels for a number of a thread, and their test for float64.
//
//   i, f, o = sigmoid(z)   g = tanh(z)   c_t = f c_{t-1} + i g   h_t = o tanh(c_t)
//
// A Math defines a value type and computes the nonlinearities. It has
//
//   Value                    with + - *
//   Gates                    four of them, gates[kI]
//   number(x)                a number of its type in every element
//   fma(a, b, c)
//   sigmoid(z)
//   hidden(o, c)             o tanh(c)
//   input(z_i, z_g, i, g)    i = sigmoid(z_i) and g = tanh(z_g), which meet in c_t
//   output(z_o, c, o, h)     o = sigmoid(z_o) and h = o tanh(c)
//   kOutputGateFirst         whether o is made before c_t where it can be; then sigmoid and hidden replace output
//   squash(c)                tanh(c) for the backward pass: value(), and slope(value) = 1 - tanh(c)^2
//   clamp(v, bound)          bounds |v|, a NaN stays one; for cells with options only
//   within(v, bound, a)      a where |v| <= bound, else 0; for cells with options only
//   below(v, bound, a)       a where |v| < bound, else 0; for cells with options only
//   unless(v, bound, a)      a where v is not bound, else 0; for cells with options only
//   activation(f, z)         activation_value of contract/activation.h, and
//   slope_of(f, value)       activation_slope, for which a Math has tanh, expm1, softplus, quotient(a, b) and
//                            where_positive(v, a, b), a where v > 0, else b; for cells with options only
//
// The functions of this file are templates of a Math, so their linkage is as internal as that of the Math. The linker
// merges no copies of them, and so cannot keep one of a newer instruction set. A CPU kernel may include this file after
// isa.h.
//
// c_{t-1} and the given gradients of the gate values are passed as accessors, there() and load() or load(gate). They
// load late, so that the value does not occupy a register earlier.
#pragma once

#include "contract/activation.h"
#include "contract/params.h"

namespace lstm_ext::cell {

// In torch's order.
enum Gate { kI, kF, kG, kO };
constexpr int kGates = 4;

// The cell of the equations above.
struct Plain {
  static constexpr bool kOptions = false, kMayBeGru = false;
};
// Every other cell has kOptions = true, and says at run time what it does beyond them:
//
//   peepholes()   adds a weight of each unit, peephole(gate), times c_{t-1} to z_i and z_f, and one times c_t to z_o
//   clips()       clamps c_t to [-clip(), clip()] before anything sees it; its gradient is that of torch.clamp
//   coupled()     f = 1 - i: z_f is not read, and its gradient is 0
//   exact_gates() see Options
//   clips_preactivations()  clamps what the nonlinearities of the gates take to [-bound, bound], with bound =
//                 preactivation_clip(). One that is at the bound passes no gradient on.
//   other_activations()     has activation(gate) and output_activation() in place of sigmoid and tanh
//   gru()         it is a GRU, see GruRow; only asked if kMayBeGru
//
// This one has the Options of contract/params.h; load(parameter) gives the numbers of its units.
template <typename T, typename Load, bool kGruToo = false>
struct CellAt {
  static constexpr bool kOptions = true, kMayBeGru = kGruToo;
  const Options<T>& options;
  Load load;
  LSTM_EXT_CONTRACT_INLINE bool peepholes() const { return options.peepholes(); }
  LSTM_EXT_CONTRACT_INLINE auto peephole(Gate gate) const {
    return load(options.parameters[gate == kI ? kPeepholeI : gate == kF ? kPeepholeF : kPeepholeO]);
  }
  LSTM_EXT_CONTRACT_INLINE bool clips() const { return options.cell_clip != 0; }
  LSTM_EXT_CONTRACT_INLINE T clip() const { return options.cell_clip; }
  LSTM_EXT_CONTRACT_INLINE bool coupled() const { return options.coupled_gates; }
  LSTM_EXT_CONTRACT_INLINE bool exact_gates() const { return options.exact_gates; }
  LSTM_EXT_CONTRACT_INLINE bool clips_preactivations() const { return options.preactivation_clip != 0; }
  LSTM_EXT_CONTRACT_INLINE T preactivation_clip() const { return options.preactivation_clip; }
  LSTM_EXT_CONTRACT_INLINE bool other_activations() const { return options.other_activations; }
  LSTM_EXT_CONTRACT_INLINE const Activation<T>& activation(Gate gate) const {
    return gate == kG ? options.candidate_activation : options.gate_activation;
  }
  LSTM_EXT_CONTRACT_INLINE const Activation<T>& output_activation() const { return options.output_activation; }
  LSTM_EXT_CONTRACT_INLINE bool gru() const { return options.gru; }
};

// The GRU of torch in the place of the four gates: r, u (torch's z), and the two parts of n, of h_{t-1} and of x_t.
//
//   r, u = sigmoid(z)   n = tanh(z_input + r z_recurrent)   c_t = (1 - u) n + u c_{t-1}   h_t = c_t
//
// U has no rows of the input part, and W none of the recurrent part. So the three of U are in torch's order in one
// piece, and those of W in two. The recurrent part has no nonlinearity: its gate value is its sum.
enum GruRow { kGruReset, kGruUpdate, kGruRecurrent, kGruInput };

// A c_{t-1} that is in a register already.
template <typename Math>
struct Here {
  typename Math::Value value;
  LSTM_EXT_CONTRACT_INLINE static constexpr bool there() { return true; }
  LSTM_EXT_CONTRACT_INLINE typename Math::Value load() const { return value; }
};
// Stands in for either accessor if there is nothing to load.
template <typename Math>
struct Nothing {
  LSTM_EXT_CONTRACT_INLINE static constexpr bool there() { return false; }
  LSTM_EXT_CONTRACT_INLINE typename Math::Value load(int = 0) const { return Math::number(0); }
};
struct NoStore {
  template <typename Value>
  LSTM_EXT_CONTRACT_INLINE void operator()(const Value&) const {}
};

// ---- the nonlinearities: sigmoid and tanh, or what the cell has in their place

template <typename Math, typename Cell>
LSTM_EXT_CONTRACT_INLINE typename Math::Value gate_value(Gate gate, typename Math::Value z, const Cell& cell) {
  if constexpr (Cell::kOptions) {
    if (cell.other_activations()) return Math::activation(cell.activation(gate), z);
  }
  return gate == kG ? Math::tanh(z) : Math::sigmoid(z);
}
// h_t, before a projection, from what its nonlinearity takes.
template <typename Math, typename Cell = Plain>
LSTM_EXT_CONTRACT_INLINE typename Math::Value hidden(typename Math::Value o, typename Math::Value c,
                                                     const Cell& cell = {}) {
  if constexpr (Cell::kOptions) {
    if (cell.other_activations()) return o * Math::activation(cell.output_activation(), c);
  }
  return Math::hidden(o, c);
}
// The nonlinearity of h_t for the backward pass.
template <typename Math>
struct AnySquashed {
  typename Math::Value now, its_slope;
  LSTM_EXT_CONTRACT_INLINE typename Math::Value value() const { return now; }
  LSTM_EXT_CONTRACT_INLINE typename Math::Value slope(typename Math::Value) const { return its_slope; }
};
template <typename Math, typename Cell = Plain>
LSTM_EXT_CONTRACT_INLINE auto squash(typename Math::Value c, const Cell& cell = {}) {
  if constexpr (Cell::kOptions) {
    if (cell.other_activations()) {
      const auto value = Math::activation(cell.output_activation(), c);
      return AnySquashed<Math>{value, Math::slope_of(cell.output_activation(), value)};
    }
    const auto squashed = Math::squash(c);
    const auto value = squashed.value();
    return AnySquashed<Math>{value, squashed.slope(value)};
  } else {
    return Math::squash(c);
  }
}

template <typename Math, typename Cell>
LSTM_EXT_CONTRACT_INLINE void clip_preactivation(typename Math::Value& z, const Cell& cell) {
  if constexpr (Cell::kOptions) {
    if (cell.clips_preactivations()) z = Math::clamp(z, cell.preactivation_clip());
  }
}

// ---- forward

// c_t from the gate values, before it is clipped. The product with f is left out if there is no c_{t-1}.
template <typename Math, typename Before>
LSTM_EXT_CONTRACT_INLINE typename Math::Value unclipped_state(const typename Math::Gates& gates, const Before& before) {
  const typename Math::Value c = gates[kI] * gates[kG];
  return before.there() ? Math::fma(gates[kF], before.load(), c) : c;
}
template <typename Math, typename Before, typename Cell = Plain>
LSTM_EXT_CONTRACT_INLINE typename Math::Value state(const typename Math::Gates& gates, const Before& before,
                                                    const Cell& cell = {}) {
  typename Math::Value c = unclipped_state<Math>(gates, before);
  if constexpr (Cell::kOptions) {
    if (cell.clips()) c = Math::clamp(c, cell.clip());
  }
  return c;
}

// Computes the three gates that c_t needs: i, f and g.
template <typename Math, typename Cell>
LSTM_EXT_CONTRACT_INLINE void state_gates(const typename Math::Gates& z, const Cell& cell,
                                          typename Math::Gates& gates) {
  if constexpr (Cell::kOptions) {
    if (cell.other_activations()) {
      gates[kI] = gate_value<Math>(kI, z[kI], cell);
      gates[kG] = gate_value<Math>(kG, z[kG], cell);
    } else {
      Math::input(z[kI], z[kG], gates[kI], gates[kG]);
    }
    if (cell.coupled()) {
      gates[kF] = Math::number(1) - gates[kI];
    } else {
      gates[kF] = gate_value<Math>(kF, z[kF], cell);
    }
  } else {
    gates[kF] = Math::sigmoid(z[kF]);
    Math::input(z[kI], z[kG], gates[kI], gates[kG]);
  }
}

// The gate values again, from preactivations as forward leaves them.
template <typename Math, typename Cell = Plain>
LSTM_EXT_CONTRACT_INLINE typename Math::Gates gate_values(const typename Math::Gates& z, const Cell& cell = {}) {
  typename Math::Gates gates;
  state_gates<Math>(z, cell, gates);
  gates[kO] = gate_value<Math>(kO, z[kO], cell);
  return gates;
}

template <typename Math>
struct Forward {
  typename Math::Gates gates;
  typename Math::Value c, h;
};

template <typename Math, typename Z, typename Before>
LSTM_EXT_CONTRACT_INLINE Forward<Math> gru_forward(const Z& z, const Before& before) {
  const auto r = Math::sigmoid(z[kGruReset]), u = Math::sigmoid(z[kGruUpdate]);
  const auto n = Math::tanh(Math::fma(r, z[kGruRecurrent], z[kGruInput]));
  Forward<Math> now;
  now.gates[kGruReset] = r;
  now.gates[kGruUpdate] = u;
  now.gates[kGruRecurrent] = z[kGruRecurrent];
  now.gates[kGruInput] = n;
  now.h = now.c = Math::fma(u, (before.there() ? before.load() : Math::number(0)) - n, n);
  return now;
}

// store(c_t) runs as soon as c_t is known. With options, z becomes what the nonlinearities see: with peepholes their
// part is added, then it is clipped, and a coupled z_f is -z_i.
template <typename Math, typename Z, typename Before, typename Cell = Plain, typename Store = NoStore>
LSTM_EXT_CONTRACT_INLINE Forward<Math> forward(Z&& z, const Before& before, const Cell& cell = {},
                                               const Store& store = {}) {
  constexpr bool kOutputGateFirst = Math::kOutputGateFirst && !Cell::kOptions;
  if constexpr (Cell::kMayBeGru) {
    if (cell.gru()) return gru_forward<Math>(z, before);
  }
  Forward<Math> now;
  if constexpr (Cell::kOptions) {
    if (cell.peepholes() && before.there()) {
      z[kI] = Math::fma(cell.peephole(kI), before.load(), z[kI]);
      z[kF] = Math::fma(cell.peephole(kF), before.load(), z[kF]);
    }
    for (const Gate gate : {kI, kF, kG}) clip_preactivation<Math>(z[gate], cell);
    if (cell.coupled()) z[kF] = Math::number(0) - z[kI];
  }
  state_gates<Math>(z, cell, now.gates);
  if constexpr (kOutputGateFirst) now.gates[kO] = Math::sigmoid(z[kO]);
  now.c = state<Math>(now.gates, before, cell);
  store(now.c);
  if constexpr (kOutputGateFirst) {
    now.h = Math::hidden(now.gates[kO], now.c);
  } else {
    if constexpr (Cell::kOptions) {
      if (cell.peepholes()) z[kO] = Math::fma(cell.peephole(kO), now.c, z[kO]);
      clip_preactivation<Math>(z[kO], cell);
      if (cell.other_activations()) {
        now.gates[kO] = gate_value<Math>(kO, z[kO], cell);
        now.h = hidden<Math>(now.gates[kO], now.c, cell);
        return now;
      }
    }
    Math::output(z[kO], now.c, now.gates[kO], now.h);
  }
  return now;
}

// ---- backward: dx is the gradient dL/dx of a loss L

template <typename Math>
LSTM_EXT_CONTRACT_INLINE typename Math::Value sigmoid_slope(typename Math::Value value) {
  return value * (Math::number(1) - value);
}
// The gradient of a preactivation from that of the gate value.
template <typename Math, typename Cell>
LSTM_EXT_CONTRACT_INLINE typename Math::Value gate_backward(Gate gate, typename Math::Value value,
                                                            typename Math::Value grad, const Cell& cell) {
  using Value = typename Math::Value;
  if constexpr (Cell::kOptions) {
    if (cell.clips_preactivations()) {
      const Value bound = Math::number(cell.preactivation_clip());
      grad = Math::unless(value, gate_value<Math>(gate, bound, cell), grad);
      grad = Math::unless(value, gate_value<Math>(gate, Math::number(0) - bound, cell), grad);
    }
    if (cell.other_activations()) return grad * Math::slope_of(cell.activation(gate), value);
  }
  return grad * (gate == kG ? Math::number(1) - value * value : sigmoid_slope<Math>(value));
}

// Backward through h_t = o tanh(c): returns dL/do and adds to dL/dc. With layer normalisation, c is the normalised c_t.
template <typename Math, typename Squashed>
LSTM_EXT_CONTRACT_INLINE typename Math::Value hidden_backward(typename Math::Value o, const Squashed& squashed,
                                                              typename Math::Value dh, typename Math::Value& dc) {
  const typename Math::Value tanh_c = squashed.value();
  dc = Math::fma(dh * o, squashed.slope(tanh_c), dc);
  return dh * tanh_c;
}

// The same for any cell, from c_t. A GRU has no output gate.
template <typename Math, typename Cell>
LSTM_EXT_CONTRACT_INLINE typename Math::Value output_backward(typename Math::Value o, typename Math::Value c,
                                                              typename Math::Value dh, typename Math::Value& dc,
                                                              const Cell& cell) {
  if constexpr (Cell::kMayBeGru) {
    if (cell.gru()) {
      dc = dc + dh;
      return Math::number(0);
    }
  }
  return hidden_backward<Math>(o, squash<Math>(c, cell), dh, dc);
}

template <typename Math>
struct Backward {
  typename Math::Gates dz;
  typename Math::Value dc_before;  // without zoneout's part of c_{t-1}
};

template <typename Math>
LSTM_EXT_CONTRACT_INLINE Backward<Math> gru_backward(const typename Math::Gates& gates, typename Math::Value c_before,
                                                     typename Math::Value dc) {
  const auto one = Math::number(1), r = gates[kGruReset], u = gates[kGruUpdate], n = gates[kGruInput];
  const auto dz_n = dc * (one - u) * (one - n * n);
  Backward<Math> result;
  result.dz[kGruReset] = dz_n * gates[kGruRecurrent] * sigmoid_slope<Math>(r);
  result.dz[kGruUpdate] = dc * (c_before - n) * sigmoid_slope<Math>(u);
  result.dz[kGruRecurrent] = dz_n * r;
  result.dz[kGruInput] = dz_n;
  result.dc_before = dc * u;
  return result;
}

// Backward through c_t, from dL/dc_t (without the peepholes' part) and dL/do. `given` is the gradient of the gate
// values if they are results of the layer.
template <typename Math, typename Given, typename Cell = Plain>
LSTM_EXT_CONTRACT_INLINE Backward<Math> state_backward(const typename Math::Gates& gates, typename Math::Value c_before,
                                                       typename Math::Value c, typename Math::Value dc,
                                                       typename Math::Value d_o, const Given& given,
                                                       const Cell& cell = {}) {
  using Value = typename Math::Value;
  if constexpr (Cell::kMayBeGru) {
    if (cell.gru()) return gru_backward<Math>(gates, c_before, dc);
  }
  Backward<Math> result;
  if constexpr (Cell::kOptions) {
    if (given.there()) d_o = d_o + given.load(kO);
    if (cell.peepholes()) dc = Math::fma(cell.peephole(kO), gate_backward<Math>(kO, gates[kO], d_o, cell), dc);
    if (cell.clips()) {
      if (cell.exact_gates()) {
        dc = Math::within(unclipped_state<Math>(gates, Here<Math>{c_before}), cell.clip(), dc);
      } else {
        dc = Math::below(c, cell.clip(), dc);
      }
    }
  }
  Value d_i = dc * gates[kG], d_f = dc * c_before, d_g = dc * gates[kI];
  if (given.there()) {
    d_i = d_i + given.load(kI);
    d_f = d_f + given.load(kF);
    d_g = d_g + given.load(kG);
    if constexpr (!Cell::kOptions) d_o = d_o + given.load(kO);
  }
  if constexpr (Cell::kOptions) {
    if (cell.coupled()) d_i = d_i - d_f;
  }
  result.dz[kI] = gate_backward<Math>(kI, gates[kI], d_i, cell);
  result.dz[kF] = gate_backward<Math>(kF, gates[kF], d_f, cell);
  result.dz[kG] = gate_backward<Math>(kG, gates[kG], d_g, cell);
  result.dz[kO] = gate_backward<Math>(kO, gates[kO], d_o, cell);
  result.dc_before = dc * gates[kF];
  if constexpr (Cell::kOptions) {
    if (cell.coupled()) result.dz[kF] = Math::number(0);
    if (cell.peepholes()) {
      result.dc_before = Math::fma(cell.peephole(kI), result.dz[kI], result.dc_before);
      result.dc_before = Math::fma(cell.peephole(kF), result.dz[kF], result.dc_before);
    }
  }
  return result;
}

template <typename Math, typename Given, typename Cell = Plain>
LSTM_EXT_CONTRACT_INLINE Backward<Math> backward(const typename Math::Gates& gates, typename Math::Value c_before,
                                                 typename Math::Value c, typename Math::Value dh,
                                                 typename Math::Value dc, const Given& given, const Cell& cell = {}) {
  const auto d_o = hidden_backward<Math>(gates[kO], squash<Math>(c, cell), dh, dc);
  return state_backward<Math>(gates, c_before, c, dc, d_o, given, cell);
}

// One cell's part of the gradient of a parameter.
template <typename Math>
LSTM_EXT_CONTRACT_INLINE typename Math::Value parameter_term(int parameter, const typename Math::Gates& dz,
                                                             typename Math::Value c_before, typename Math::Value c) {
  if (parameter == kPeepholeO) return dz[kO] * c;
  return dz[parameter == kPeepholeI ? kI : kF] * c_before;
}

}  // namespace lstm_ext::cell
