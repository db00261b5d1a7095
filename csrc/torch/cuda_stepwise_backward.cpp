#include "torch/cuda_stepwise_common.h"

namespace lstm_ext {
namespace {

// A sequence (T, B, n) or (N, n) as kernels read it, step by step.
template <typename T>
struct StepRows {
  const T* data;
  int64_t stride;
};
template <typename T>
StepRows<T> step_rows(const at::Tensor& sequence, const Step& step) {
  if (!sequence.defined()) return {nullptr, 0};
  const int64_t place = sequence.dim() == 3 ? step.time : step.offset;
  return {const_row_pointer<T>(sequence, place), sequence.stride(-2)};
}

class StepwiseBackward : Stepwise {
 public:
  StepwiseBackward(const LayerArguments& layer, const LayerSizes& sizes, const BackwardArguments& arguments,
                   const StepwiseDevice& device)
      // float16 has no more digits than TF32, so its products lose nothing of an operand by it; the gate gradients,
      // which are float32 there, keep what float16 would lose.
      : Stepwise(layer, sizes, device, device.tf32 || layer.input.scalar_type() == at::kHalf),
        wanted_(arguments.wanted),
        output_(with_contiguous_rows(arguments.output)),
        grad_output_(arguments.grad_output ? with_contiguous_rows(*arguments.grad_output) : at::Tensor()),
        grad_h_n_(contiguous_or_undefined(arguments.grad_h_n, dtype_)),
        grad_c_n_(contiguous_or_undefined(arguments.grad_c_n, dtype_)),
        grad_gate_values_(contiguous_or_undefined(arguments.grad_gates, s.gates_type)),
        grad_cells_(contiguous_or_undefined(arguments.grad_cells, s.sum_type)),
        gradient_type_(dtype_ == at::kHalf ? at::kFloat : dtype_),
        grads_(wanted_.size()) {
    take_saved(arguments.saved);
    const auto sums = [&](const at::Tensor& of) { return at::zeros(of.sizes(), options(s.sum_type)); };
    if (wanted_[0]) grads_[0] = at::empty(s.sequence_sizes(s.input_size), options(dtype_));
    if (wanted_[1] && h0_.defined()) grads_[1] = at::empty(h0_.sizes(), options(s.sum_type));
    if (wanted_[2] && c0_.defined()) grads_[2] = at::empty(c0_.sizes(), options(s.sum_type));
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (wanted_[3 + i]) grads_[3 + i] = sums(weights_[i]);
    }
    const size_t first = of_extras();
    if (wanted_.size() > first) {
      if (wanted_[first] && reset_h_.defined()) grads_[first] = sums(reset_h_);
      if (wanted_[first + 1] && reset_c_.defined()) grads_[first + 1] = sums(reset_c_);
      for (size_t i = 0; i < norm_.size(); ++i) {
        if (wanted_[first + 2 + i]) grads_[first + 2 + i] = sums(norm_[i]);
      }
    }
    for (size_t i = 0; i < grads_.size(); ++i) types_.push_back(dtype_);
    for (size_t i = 0; i < norm_.size() && wanted_.size() > first; ++i) {
      types_[first + 2 + i] = layer.extras.norm[i].scalar_type();
    }
    if (lengths_.defined()) {
      const at::Tensor times = at::arange(s.steps, lengths_.options()).unsqueeze(1);
      padding_ = times.ge(lengths_).view({-1, 1});
    }
  }

  std::vector<at::Tensor> run() {
    for (int64_t d = 0; d < s.directions; ++d) {
      if (s.batch == 0) continue;
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "lstm_layer_backward",
                                      [&] { run_direction<typename Stored<scalar_t>::type>(d); });
    }
    for (size_t i = 0; i < grads_.size(); ++i) {
      if (grads_[i].defined()) grads_[i] = in_type(grads_[i], types_[i]);
    }
    return std::move(grads_);
  }

 private:
  // The factors and results of the products over a piece of the sequence, and what a step leaves to the step before.
  struct Buffers {
    at::Tensor gates;        // (rows of a piece, 4H): gradients of U h; without layer normalisation also of the rest
    at::Tensor input_gates;  // with it: of W x
    at::Tensor pre_activations, visible, cell_hat;  // as in cuda::NormCellBackward
    at::Tensor output;                              // (rows of a piece, P), with a projection
    at::Tensor hidden;                              // o * tanh(c) of a piece, where it was not saved
    at::Tensor recurrent;                           // (B, P): dL/dh_t through the step after t
    at::Tensor grad_hidden;                         // (B, H), with a projection: dL/d(o * tanh(c_t))
    at::Tensor grad_c, grad_h;                      // (B, H); with zoneout (B, P), of what it keeps
    at::Tensor begin_gates, reset_gates;            // as in cuda::CellBackward
  };
  // Sums; undefined where not wanted.
  struct Gradients {
    at::Tensor h0, c0, weight_ih, weight_hh, bias, weight_hr;
    at::Tensor reset_h, reset_c;
    at::Tensor gain_ih, gain_hh, gain_c, bias_c;
  };

  // The place of the gradients of what replaces states; after them, those of layer normalisation.
  size_t of_extras() const { return 3 + weights_.size(); }

  at::Tensor operand(const at::Tensor& t) const { return in_type(t, gradient_type_); }

  // In the order of StepwiseForward::run.
  void take_saved(const std::vector<at::Tensor>& saved) {
    auto next = saved.begin();
    if (!recompute_) gates_ = (next++)->contiguous();
    cells_ = (next++)->contiguous();
    if (s.projected && !recompute_) hidden_ = (next++)->contiguous();
    if (norm_.empty()) return;
    for (at::Tensor* t : {&products_hat_, &factors_}) *t = (next++)->contiguous();
  }

  Gradients gradients(int64_t d) const {
    const at::Tensor* w = grads_.data() + 3 + d * s.weights_per_direction;
    Gradients g;
    g.h0 = part_of(grads_[1], d);
    g.c0 = part_of(grads_[2], d);
    g.weight_ih = w[0];
    g.weight_hh = w[1];
    // Both biases are added to the same sum, so they have the same gradient.
    if (has_bias_) g.bias = w[2].defined() ? w[2] : w[3];
    if (s.projected) g.weight_hr = w[s.weights_per_direction - 1];
    if (grads_.size() == of_extras()) return g;
    g.reset_h = part_of(grads_[of_extras()], d);
    g.reset_c = part_of(grads_[of_extras() + 1], d);
    if (norm_.empty()) return g;
    const at::Tensor* n = grads_.data() + of_extras() + 2 + d * norms_per_direction();
    g.gain_ih = n[0];
    g.gain_hh = n[1];
    g.gain_c = n[2];
    if (has_bias_) g.bias_c = n[3];
    return g;
  }

  Buffers buffers(const Direction& l, const Gradients& g, int64_t piece) const {
    const int64_t H = s.hidden_size, P = s.output_size;
    const auto of_piece = [&](bool there, int64_t features, at::ScalarType type) {
      return empty_if(there, {piece, features}, options(type));
    };
    const auto of_step = [&](bool there, int64_t features) {
      return empty_if(there, {s.batch, features}, options(s.sum_type));
    };
    Buffers b;
    b.gates = of_piece(true, 4 * H, gradient_type_);
    b.input_gates = of_piece(l.normalised(), 4 * H, gradient_type_);
    b.pre_activations = of_piece(l.normalised(), 4 * H, s.sum_type);
    b.visible = of_piece(l.normalised(), H, s.sum_type);
    b.cell_hat = of_piece(l.normalised(), H, dtype_);
    b.output = of_piece(s.projected, P, gradient_type_);
    b.hidden = of_piece(g.weight_hr.defined() && !hidden_.defined(), H, dtype_);
    b.recurrent = of_step(true, P);
    b.grad_hidden = of_step(s.projected, H);
    b.grad_c = g.c0.defined() ? g.c0 : of_step(true, H);
    b.grad_h = of_step(keeps_h(), P);
    b.begin_gates = empty_if(g.h0.defined(), {s.batch, 4 * H}, options(gradient_type_));
    b.reset_gates = zeros_if(g.reset_h.defined(), {s.batch, 4 * H}, options(s.sum_type));
    if (lengths_.defined()) {  // rows of length 0 have no step that writes these
      for (const at::Tensor& t : {b.grad_c, b.grad_h, b.begin_gates}) {
        if (t.defined()) t.zero_();
      }
    }
    return b;
  }

  std::vector<Piece> pieces_of(const Steps& steps) const {
    // What is kept for each row: see Buffers.
    const auto gradient = static_cast<int64_t>(c10::elementSize(gradient_type_));
    const auto sum = static_cast<int64_t>(c10::elementSize(s.sum_type));
    int64_t bytes = 4 * s.hidden_size * gradient;
    if (!norm_.empty()) bytes += 4 * s.hidden_size * (gradient + sum);
    if (recompute_) bytes += 4 * s.hidden_size * sum;
    const int64_t limit = piece_rows(bytes);
    std::vector<Piece> pieces;
    for (int64_t n = 0; n < steps.count(); n = pieces.back().end) {
      pieces.emplace_back(steps, n, steps.piece_end(n, limit));
    }
    return pieces;
  }

  template <typename T>
  void run_direction(int64_t d) {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const Direction l = direction(d);
    const Steps steps(s, d == 1);
    const int64_t H = s.hidden_size, P = s.output_size;
    const at::Tensor gates = saved_rows(gates_, d), cells = saved_rows(cells_, d);
    const at::Tensor grad_output = grad_output_.defined() ? grad_output_.narrow(-1, d * P, P) : grad_output_;
    const at::Tensor grad_h_n = part_of(grad_h_n_, d), grad_c_n = part_of(grad_c_n_, d);
    const at::Tensor grad_gate_values = saved_rows(grad_gate_values_, d), grad_cells = saved_rows(grad_cells_, d);
    const at::Tensor weight_hh = operand(l.weight_hh);
    const at::Tensor weight_hr = s.projected ? operand(l.weight_hr) : at::Tensor();

    const std::vector<Piece> pieces = pieces_of(steps);
    int64_t longest = 0;
    for (const Piece& piece : pieces) {
      longest = std::max(longest, steps.offset(piece.finish) - steps.offset(piece.begin));
    }
    const Gradients g = gradients(d);
    const Buffers b = buffers(l, g, longest);
    const RowsGemm through_gates = rows_gemm(b.recurrent, b.gates, weight_hh);
    const std::optional<RowsGemm> projection = rows_gemm_if(s.projected, b.grad_hidden, b.output, weight_hr);

    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
      const at::Tensor again = recompute_ ? pre_activations_of<T>(l, steps, *piece, d) : at::Tensor();
      for (int64_t n = piece->end - 1; n >= piece->first; --n) {
        const Step step = steps[n];
        const int64_t place = step.offset - steps.offset(piece->begin);
        const StepRows<T> dy = step_rows<T>(grad_output, step);
        cuda::CellBackward<T> p{};
        p.of = rows_of(steps, n, step);
        p.hidden_size = H;
        p.pre_activations = recompute_ ? const_row_pointer<T>(again, place) : const_row_pointer<T>(gates, step.offset);
        p.cells = const_row_pointer<A>(cells, step.offset);
        p.c_previous = {const_row_pointer<A>(cells, n > 0 ? steps[n - 1].offset : 0), const_row_pointer<T>(l.c0),
                        const_row_pointer<T>(l.reset_c)};
        p.zoneout = zoneout_c<A>(l, step);
        p.grad_c_n = const_row_pointer<T>(grad_c_n);
        p.grad_gate_values = const_row_pointer<T>(grad_gate_values, step.offset);
        p.grad_cells = const_row_pointer<A>(grad_cells, step.offset);
        p.grad_c = row_pointer<A>(b.grad_c);
        p.grad_gates = row_pointer<D>(b.gates, place);
        p.begin_gates = row_pointer<D>(b.begin_gates);
        p.reset_gates = row_pointer<A>(b.reset_gates);
        p.grad_reset_c = row_pointer<A>(g.reset_c);
        p.hidden = row_pointer<T>(b.hidden, place);
        cuda::GradOutput<T> dh{};
        dh.grad_output = dy.data;
        dh.grad_output_stride = dy.stride;
        dh.grad_h_n = const_row_pointer<T>(grad_h_n);
        dh.recurrent_part = const_row_pointer<A>(b.recurrent);
        dh.mask = const_row_pointer<A>(l.mask);
        dh.zoneout = zoneout_h<A>(l, step);
        dh.grad_h = row_pointer<A>(b.grad_h);
        dh.grad_reset_h = row_pointer<A>(g.reset_h);
        if (projection) {
          const cuda::OutputGradient<T> sum{p.of, P, dh, row_pointer<D>(b.output, place)};
          check(cuda::output_gradient(sum, device_.stream), "output_gradient");
          product((*projection)(0, place, step.rows));
          p.grad_hidden = const_row_pointer<A>(b.grad_hidden);
        } else {
          p.output = dh;
        }
        start(p, l, b, step, place, d);
        if (step.continuing > 0) product(through_gates(0, place, step.continuing));
      }
      add_piece<T>(l, steps, *piece, d, b, g);
    }
    finish_states(l, b, g, grad_h_n, grad_c_n, weight_hh);
    if (has_bias_) {
      const size_t ih = 3 + d * s.weights_per_direction + 2;
      if (grads_[ih].defined() && grads_[ih + 1].defined()) grads_[ih + 1].copy_(grads_[ih]);
    }
  }

  template <typename T>
  void start(const cuda::CellBackward<T>& cell, const Direction& l, const Buffers& b, const Step& step, int64_t place,
             int64_t d) const {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    if (!l.normalised()) {
      check(cuda::cell_backward(cell, device_.stream), "cell_backward");
      return;
    }
    cuda::NormCellBackward<T> p{};
    p.cell = cell;
    p.gain_ih = const_row_pointer<A>(l.gain_ih);
    p.gain_hh = const_row_pointer<A>(l.gain_hh);
    p.gain_c = const_row_pointer<A>(l.gain_c);
    p.bias_c = const_row_pointer<A>(l.bias_c);
    p.input_hat = const_row_pointer<T>(saved_rows(products_hat_, d), step.offset);
    p.recurrent_hat = const_row_pointer<T>(saved_rows(products_hat_, s.directions + d), step.offset);
    p.factors = const_row_pointer<A>(saved_rows(factors_, d), step.offset);
    p.grad_input_part = row_pointer<D>(b.input_gates, place);
    p.grad_pre_activations = row_pointer<A>(b.pre_activations, place);
    p.grad_visible = row_pointer<A>(b.visible, place);
    p.cell_hat = row_pointer<T>(b.cell_hat, place);
    check(cuda::norm_cell_backward(p, device_.stream), "norm_cell_backward");
  }

  // dL/dh of the states that rows begin from and of those that replace others, each by one product for all steps.
  void finish_states(const Direction& l, const Buffers& b, const Gradients& g, const at::Tensor& grad_h_n,
                     const at::Tensor& grad_c_n, const at::Tensor& weight_hh) const {
    const auto through_product = [&](const at::Tensor& result, const at::Tensor& gates, const at::Tensor& weight) {
      product(result, gates, weight);
      if (l.mask.defined()) result.mul_(l.mask);
    };
    if (g.h0.defined()) {
      through_product(g.h0, b.begin_gates, weight_hh);
      if (b.grad_h.defined()) g.h0.add_(b.grad_h);
    }
    if (g.reset_h.defined()) {
      // What zoneout keeps is there already.
      const at::Tensor sum = keeps_h() ? at::empty_like(g.reset_h) : g.reset_h;
      through_product(sum, b.reset_gates, in_type(l.weight_hh, s.sum_type));
      if (keeps_h()) g.reset_h.add_(sum);
    }
    if (!lengths_.defined()) return;
    // A row of length 0 ends as it begins.
    const at::Tensor steps = lengths_.gt(0).unsqueeze(1);
    const auto add_where_empty = [&](const at::Tensor& initial, const at::Tensor& last) {
      if (initial.defined() && last.defined()) initial.add_(last.to(s.sum_type).masked_fill(steps, 0));
    };
    add_where_empty(g.h0, grad_h_n);
    add_where_empty(g.c0, grad_c_n);
  }

  // The products over the steps of a piece.
  template <typename T>
  void add_piece(const Direction& l, const Steps& steps, const Piece& piece, int64_t d, const Buffers& b,
                 const Gradients& g) {
    const int64_t first = steps.offset(piece.begin);
    const int64_t rows = steps.offset(piece.finish) - first;
    const at::Tensor gates = b.gates.narrow(0, 0, rows);
    const at::Tensor input_gates = l.normalised() ? b.input_gates.narrow(0, 0, rows) : gates;
    if (grads_[0].defined()) {
      const at::Tensor grad_input = grads_[0].view({total_rows(), -1}).narrow(0, first, rows);
      add_input_gradient(grad_input, input_gates, operand(l.weight_ih), d > 0);
    }
    if (g.weight_ih.defined()) {
      at::Tensor x = rows_between(l.input, steps, piece.begin, piece.finish);
      // Whatever padding holds: 0 times infinity is not 0.
      if (padding_.defined()) x = x.masked_fill(padding_.narrow(0, first, rows), 0);
      product(g.weight_ih, input_gates.t(), operand(x), true);
    }
    if (g.weight_hh.defined()) add_recurrent_gradient<T>(l, steps, piece, d, gates, g.weight_hh);
    if (l.normalised()) {
      add_products<T>(g.bias, b.pre_activations, {}, rows);
      add_products<T>(g.gain_ih, b.pre_activations, saved_rows(products_hat_, d).narrow(0, first, rows), rows);
      add_products<T>(g.gain_hh, b.pre_activations, saved_rows(products_hat_, s.directions + d).narrow(0, first, rows),
                      rows);
      add_products<T>(g.gain_c, b.visible, b.cell_hat, rows);
      add_products<T>(g.bias_c, b.visible, {}, rows);
    } else if (g.bias.defined()) {
      using A = typename cuda::Types<T>::Accumulate;
      using D = typename cuda::Types<T>::Gradient;
      const at::Tensor partial = partial_sums(rows, gates.size(1));
      const cuda::ColumnSums<T> sums{rows, gates.size(1), const_row_pointer<D>(gates), row_pointer<A>(partial),
                                     row_pointer<A>(g.bias)};
      check(cuda::column_sums(sums, device_.stream), "column_sums");
    }
    if (g.weight_hr.defined()) {
      const at::Tensor hidden =
          b.hidden.defined() ? b.hidden.narrow(0, 0, rows) : saved_rows(hidden_, d).narrow(0, first, rows);
      product(g.weight_hr, b.output.narrow(0, 0, rows).t(), operand(hidden), true);
    }
  }

  at::Tensor partial_sums(int64_t rows, int64_t columns) const {
    return at::empty({cuda::column_sum_parts(rows), columns}, options(s.sum_type));
  }

  template <typename T>
  void add_products(const at::Tensor& sum, const at::Tensor& values, const at::Tensor& factors, int64_t rows) const {
    using A = typename cuda::Types<T>::Accumulate;
    if (!sum.defined()) return;
    const at::Tensor partial = partial_sums(rows, values.size(1));
    const cuda::ProductSums<T> sums{rows,
                                    values.size(1),
                                    const_row_pointer<A>(values),
                                    const_row_pointer<T>(factors),
                                    row_pointer<A>(partial),
                                    row_pointer<A>(sum)};
    check(cuda::product_sums(sums, device_.stream), "product_sums");
  }

  void add_input_gradient(const at::Tensor& grad_input, const at::Tensor& gates, const at::Tensor& weight_ih,
                          bool accumulate) const {
    if (gradient_type_ == dtype_) {
      product(grad_input, gates, weight_ih, accumulate);
      return;
    }
    const at::Tensor sum = at::empty(grad_input.sizes(), options(gradient_type_));
    product(sum, gates, weight_ih);
    if (accumulate) sum.add_(grad_input);
    grad_input.copy_(sum);
  }

  // dL/dU: the gate gradients of each step with h of the step before.
  template <typename T>
  void add_recurrent_gradient(const Direction& l, const Steps& steps, const Piece& piece, int64_t d,
                              const at::Tensor& gates, const at::Tensor& weight_hh) const {
    const int64_t P = s.output_size;
    if (s.packed() || resets_.defined() || lengths_.defined() || mask_.defined()) {
      product(weight_hh, gates.t(), previous_outputs<T>(l, steps, piece, d), true);
      return;
    }
    // Of dense data the steps before are the same rows, moved by a step.
    const int64_t moved = d == 1 ? 1 : -1;
    const int64_t begin = d == 1 ? piece.begin : std::max<int64_t>(piece.begin, 1);
    const int64_t finish = d == 1 ? std::min(piece.finish, s.steps - 1) : piece.finish;
    const auto gates_between = [&](int64_t from, int64_t to) {
      return gates.narrow(0, (from - piece.begin) * s.batch, (to - from) * s.batch);
    };
    if (begin < finish) {
      const at::Tensor h = output_.narrow(-1, d * P, P);
      product(weight_hh, gates_between(begin, finish).t(),
              operand(rows_between(h, steps, begin + moved, finish + moved)), true);
    }
    if (piece.first == 0 && l.h0.defined()) {
      const int64_t time = steps[0].time;
      product(weight_hh, gates_between(time, time + 1).t(), operand(l.h0), true);
    }
  }

  // In gradient_type_.
  template <typename T>
  at::Tensor previous_outputs(const Direction& l, const Steps& steps, const Piece& piece, int64_t d) const {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const int64_t P = s.output_size, first = steps.offset(piece.begin);
    const at::Tensor h = rows_between(output_.narrow(-1, d * P, P), steps, 0, steps.count());
    const at::Tensor result = at::empty({steps.offset(piece.finish) - first, P}, options(gradient_type_));
    for (int64_t n = piece.first; n < piece.end;) {
      cuda::PreviousOutputs<T> p{};
      p.output_size = P;
      p.previous_stride = h.stride(0);
      p.h0 = const_row_pointer<T>(l.h0);
      p.reset_h = const_row_pointer<T>(l.reset_h);
      p.lengths = const_row_pointer<int64_t>(lengths_);
      p.mask = const_row_pointer<A>(l.mask);
      p.reverse = steps.reverse();
      for (; n < piece.end && p.steps < p.kSteps; ++n) {
        const Step step = steps[n];
        p.step[p.steps++] = {step.rows,
                             step.continuing,
                             const_row_pointer<T>(h, n > 0 ? steps[n - 1].offset : 0),
                             row_pointer<D>(result, step.offset - first),
                             resets_of(steps, n),
                             step.time};
      }
      check(cuda::previous_outputs(p, device_.stream), "previous_outputs");
    }
    return result;
  }

  // What the forward pass did not save of a piece (rows, 4H), by two products over all its steps.
  template <typename T>
  at::Tensor pre_activations_of(const Direction& l, const Steps& steps, const Piece& piece, int64_t d) const {
    const at::Tensor x = rows_between(l.input, steps, piece.begin, piece.finish);
    const at::Tensor sum = at::empty({x.size(0), 4 * s.hidden_size}, options(s.sum_type));
    product(sum, x, l.weight_ih.t());
    product(sum, in_type(previous_outputs<T>(l, steps, piece, d), dtype_), l.weight_hh.t(), true);
    if (l.bias_ih.defined()) sum.add_(l.bias_ih.to(s.sum_type).add(l.bias_hh));
    return in_type(sum, dtype_);
  }

  const std::vector<bool>& wanted_;
  const at::Tensor output_;
  at::Tensor gates_, cells_, hidden_, products_hat_, factors_;
  const at::Tensor grad_output_, grad_h_n_, grad_c_n_, grad_gate_values_, grad_cells_;
  const at::ScalarType gradient_type_;  // as cuda::Types<T>::Gradient
  std::vector<at::Tensor> grads_;       // sums, and that of the input
  std::vector<at::ScalarType> types_;   // of what is returned
  at::Tensor padding_;                  // (all rows, 1), with lengths: whether a row takes no part
};

}  // namespace

std::vector<at::Tensor> stepwise_backward(const LayerArguments& layer, const LayerSizes& sizes,
                                          const BackwardArguments& arguments, const StepwiseDevice& device) {
  return StepwiseBackward(layer, sizes, arguments, device).run();
}

}  // namespace lstm_ext
