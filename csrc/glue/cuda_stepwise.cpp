#include "glue/cuda_stepwise.h"

#include <ATen/ATen.h>

#include "glue/cuda_steps.h"
#include "glue/tensors.h"

namespace lstm_ext {
namespace {

// The type that kernels know a dtype by.
template <typename Scalar>
struct Stored {
  using type = Scalar;
};
template <>
struct Stored<at::Half> {
  using type = __half;
};
template <>
struct Stored<at::BFloat16> {
  using type = __nv_bfloat16;
};

// Row `row` of a tensor whose rows are the first axis, or null.
template <typename T>
T* row_pointer(const at::Tensor& t, int64_t row = 0) {
  return t.defined() ? static_cast<T*>(t.mutable_data_ptr()) + row * t.stride(0) : nullptr;
}
template <typename T>
const T* const_row_pointer(const at::Tensor& t, int64_t row = 0) {
  return t.defined() ? static_cast<const T*>(t.const_data_ptr()) + row * t.stride(0) : nullptr;
}

at::Tensor part_of(const at::Tensor& t, int64_t direction) { return t.defined() ? t.select(0, direction) : t; }

at::Tensor transposed(const at::Tensor& t) { return t.defined() ? t.t() : t; }

at::Tensor empty_if(bool there, at::IntArrayRef sizes, const at::TensorOptions& options) {
  return there ? at::empty(sizes, options) : at::Tensor();
}

// The steps from time `begin` to time `finish` one below the other: (rows, n). A copy where memory has them otherwise.
at::Tensor rows_between(const at::Tensor& sequence, const Steps& steps, int64_t begin, int64_t finish) {
  if (sequence.dim() == 3) return sequence.narrow(0, begin, finish - begin).flatten(0, 1);
  return sequence.narrow(0, steps.offset(begin), steps.offset(finish) - steps.offset(begin));
}

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

at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  const at::Tensor t = materialized(tensor);
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous();
}

// The arguments of one direction. States (B, ...) contiguous or undefined, weights contiguous.
struct Direction {
  at::Tensor input;
  at::Tensor h0, c0;
  at::Tensor weight_ih, weight_hh;
  at::Tensor bias_ih, bias_hh;  // undefined where the layer has none
  at::Tensor weight_hr;
  at::Tensor reset_h, reset_c;  // as h0 and c0
};

class Stepwise {
 public:
  Stepwise(const LayerArguments& layer, const LayerSizes& sizes, const StepwiseDevice& device, bool tf32)
      : s(sizes),
        device_(device),
        tf32_(tf32),
        dtype_(layer.input.scalar_type()),
        has_bias_(layer.has_bias),
        input_(with_contiguous_rows(layer.input)),
        h0_(contiguous_or_undefined(layer.h0, dtype_)),
        c0_(contiguous_or_undefined(layer.c0, dtype_)),
        weights_(contiguous_weights(layer.weights, dtype_)),
        resets_(contiguous_or_undefined(layer.extras.resets, at::kBool)),
        reset_h_(contiguous_or_undefined(layer.extras.reset_h, dtype_)),
        reset_c_(contiguous_or_undefined(layer.extras.reset_c, dtype_)) {}

 protected:
  Direction direction(int64_t d) const {
    const at::Tensor* w = weights_.data() + d * s.weights_per_direction;
    return {input_,
            part_of(h0_, d),
            part_of(c0_, d),
            w[0],
            w[1],
            has_bias_ ? w[2] : at::Tensor(),
            has_bias_ ? w[3] : at::Tensor(),
            s.projected ? w[s.weights_per_direction - 1] : at::Tensor(),
            part_of(reset_h_, d),
            part_of(reset_c_, d)};
  }

  // Of step n in the direction of time. In the reverse direction a cut lies before the step that is after it in time.
  cuda::ResetFlags resets_of(const Steps& steps, int64_t n) const {
    const int64_t cut = steps.reverse() ? n - 1 : n;
    if (!resets_.defined() || cut < 0 || cut >= steps.count()) return {nullptr, 0};
    const Step step = steps[cut];
    static_assert(sizeof(bool) == sizeof(uint8_t));
    return {static_cast<const uint8_t*>(resets_.const_data_ptr()) + step.offset, step.rows};
  }

  // All rows of the sequence, one below the other.
  int64_t total_rows() const { return s.packed() ? s.step_offsets.back() : s.steps * s.batch; }
  // How many rows a piece of the sequence may have, of which `bytes` are kept for each.
  int64_t piece_rows(int64_t bytes) const { return std::max<int64_t>(device_.chunk_bytes / bytes, 1); }

  at::TensorOptions options(at::ScalarType type) const { return input_.options().dtype(type); }

  // c = a b, or c += a b.
  void product(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b, bool accumulate = false) const {
    // A cell may have no input features; what cuBLAS does then it does not say.
    if (a.size(1) == 0 && !accumulate) c.zero_();
    if (a.size(1) == 0 || c.numel() == 0) return;
    // Kept until the product is on its way; the allocator keeps the memory until it is done.
    const at::Tensor left = gemm_operand(a), right = gemm_operand(b);
    product(describe_gemm(c, left, right, accumulate, tf32_));
  }
  RowsGemm rows_gemm(const at::Tensor& c, const at::Tensor& a, const at::Tensor& b) const { return {c, a, b, tf32_}; }
  std::optional<RowsGemm> rows_gemm_if(bool there, const at::Tensor& c, const at::Tensor& a,
                                       const at::Tensor& b) const {
    return there ? std::optional<RowsGemm>(rows_gemm(c, a, b)) : std::nullopt;
  }

  void product(const Gemm& gemm) const { device_.gemm(gemm, device_.context); }

  void check(cudaError_t error, const char* kernel) const {
    TORCH_CHECK(error == cudaSuccess, "lstm_ext: the kernel ", kernel, " did not start: ", cudaGetErrorString(error));
  }

  const LayerSizes& s;
  const StepwiseDevice& device_;
  const bool tf32_;
  const at::ScalarType dtype_;
  const bool has_bias_;
  const at::Tensor input_, h0_, c0_;
  const std::vector<at::Tensor> weights_;
  const at::Tensor resets_, reset_h_, reset_c_;  // undefined where there are none
};

// ---- forward

// W x_t of a piece of the sequence; the rows of a step are `stride` rows apart.
struct InputPart {
  at::Tensor rows;
  int64_t first_of_step(const Steps& steps, const Piece& piece, const Step& step) const {
    return batch_first ? step.time : step.offset - steps.offset(piece.begin);
  }
  int64_t stride;
  bool batch_first;
};

class StepwiseForward : Stepwise {
 public:
  StepwiseForward(const LayerArguments& layer, const LayerSizes& sizes, bool save, const StepwiseDevice& device)
      : Stepwise(layer, sizes, device, device.tf32),
        output_(at::empty(s.sequence_sizes(s.directions * s.output_size), options(dtype_))),
        h_n_(at::empty({s.directions, s.batch, s.output_size}, options(dtype_))),
        c_n_(at::empty({s.directions, s.batch, s.hidden_size}, options(dtype_))),
        gates_(empty_if(save, s.saved_sizes(4 * s.hidden_size), options(s.gates_type))),
        cells_(empty_if(save, s.saved_sizes(s.hidden_size), options(s.sum_type))),
        hidden_(empty_if(save && s.projected, s.saved_sizes(s.hidden_size), options(s.gates_type))) {}

  ForwardResult run() {
    if (s.batch > 0) {
      for (int64_t d = 0; d < s.directions; ++d) {
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "lstm_layer_forward",
                                        [&] { run_direction<typename Stored<scalar_t>::type>(d); });
      }
    }
    std::vector<at::Tensor> saved;
    for (const at::Tensor& t : {gates_, cells_, hidden_}) {
      if (t.defined()) saved.push_back(t);
    }
    return {output_, h_n_, c_n_, saved};
  }

 private:
  InputPart input_part(const Direction& l, const Steps& steps, const Piece& piece) const {
    const int64_t batch = s.batch;
    const auto result = [&](const at::Tensor& x, int64_t stride, bool batch_first) {
      const at::Tensor rows = at::empty({x.size(0), 4 * s.hidden_size}, options(s.sum_type));
      product(rows, x, l.weight_ih.t());
      return InputPart{rows, stride, batch_first};
    };
    // Batch-first data, taken whole, as it lies.
    const at::Tensor& x = l.input;
    if (!s.packed() && piece.begin == 0 && piece.finish == s.steps && batch > 1 && x.stride(0) == x.size(2) &&
        x.stride(1) == s.steps * x.size(2)) {
      return result(x.transpose(0, 1).flatten(0, 1), s.steps, true);
    }
    return result(rows_between(x, steps, piece.begin, piece.finish), 1, false);
  }

  template <typename T>
  void run_direction(int64_t d) {
    using A = typename cuda::Types<T>::Accumulate;
    const Direction l = direction(d);
    const Steps steps(s, d == 1);
    const int64_t H = s.hidden_size;
    const bool save = gates_.defined();
    const at::Tensor output = output_.view({total_rows(), -1}).narrow(1, d * s.output_size, s.output_size);
    const at::Tensor h_n = h_n_.select(0, d), c_n = c_n_.select(0, d);
    const auto saved_rows = [&](const at::Tensor& t) { return part_of(t, d).view({total_rows(), -1}); };
    const at::Tensor gates = save ? saved_rows(gates_) : gates_;
    // One step's at a time in inference.
    const at::Tensor cells = save ? saved_rows(cells_) : at::empty({s.batch, H}, options(s.sum_type));
    at::Tensor hidden;
    if (s.projected) hidden = save ? saved_rows(hidden_) : at::empty({s.batch, H}, options(dtype_));
    const at::Tensor recurrent = at::empty({s.batch, 4 * H}, options(s.sum_type));
    const RowsGemm from_output = rows_gemm(recurrent, output, l.weight_hh.t());
    const std::optional<RowsGemm> from_h0 = rows_gemm_if(l.h0.defined(), recurrent, l.h0, l.weight_hh.t());
    const std::optional<RowsGemm> projection = rows_gemm_if(s.projected, output, hidden, transposed(l.weight_hr));

    const at::Tensor reset_part = empty_if(l.reset_h.defined(), {s.batch, 4 * H}, options(s.sum_type));
    if (reset_part.defined()) product(reset_part, l.reset_h, l.weight_hh.t());

    const int64_t limit = piece_rows(4 * H * static_cast<int64_t>(sizeof(A)));
    for (int64_t n = 0; n < steps.count();) {
      const Piece piece(steps, n, steps.piece_end(n, limit));
      const InputPart input = input_part(l, steps, piece);
      for (; n < piece.end; ++n) {
        const Step step = steps[n];
        const Step before = n > 0 ? steps[n - 1] : Step{};
        if (step.continuing > 0) product(from_output(0, before.offset, step.continuing));
        const int64_t beginning = step.rows - step.continuing;
        if (beginning > 0 && from_h0) product((*from_h0)(step.continuing, step.continuing, beginning));
        cuda::CellForward<T> p{};
        p.rows = step.rows;
        p.hidden_size = H;
        p.input_part = const_row_pointer<A>(input.rows, input.first_of_step(steps, piece, step));
        p.input_stride = input.stride * 4 * H;
        p.recurrent_part = const_row_pointer<A>(recurrent);
        p.recurrent_rows = l.h0.defined() ? step.rows : step.continuing;
        p.reset_part = const_row_pointer<A>(reset_part);
        p.bias_ih = const_row_pointer<T>(l.bias_ih);
        p.bias_hh = const_row_pointer<T>(l.bias_hh);
        p.c_previous = {step.continuing, const_row_pointer<A>(cells, save ? before.offset : 0),
                        const_row_pointer<T>(l.c0), resets_of(steps, n), const_row_pointer<T>(l.reset_c)};
        p.c = row_pointer<A>(cells, save ? step.offset : 0);
        const int64_t place = s.projected && !save ? 0 : step.offset;
        const at::Tensor& h = s.projected ? hidden : output;
        p.h = row_pointer<T>(h, place);
        p.h_stride = h.stride(0);
        p.pre_activations = row_pointer<T>(gates, step.offset);
        p.going_on = step.going_on;
        p.h_n = s.projected ? nullptr : row_pointer<T>(h_n);
        p.c_n = row_pointer<T>(c_n);
        check(cuda::cell_forward(p, device_.stream), "cell_forward");
        if (projection) {
          product((*projection)(step.offset, place, step.rows));
          const int64_t ending = step.rows - step.going_on;
          if (ending > 0) {
            h_n.narrow(0, step.going_on, ending).copy_(output.narrow(0, step.offset + step.going_on, ending));
          }
        }
      }
    }
  }

  const at::Tensor output_, h_n_, c_n_;
  const at::Tensor gates_, cells_, hidden_;  // undefined where they are not saved
};

// ---- backward

class StepwiseBackward : Stepwise {
 public:
  StepwiseBackward(const LayerArguments& layer, const LayerSizes& sizes, const BackwardArguments& arguments,
                   const StepwiseDevice& device)
      // float16 has no more digits than TF32, so its products lose nothing of an operand by it; the gate gradients,
      // which are float32 there, keep what float16 would lose.
      : Stepwise(layer, sizes, device, device.tf32 || layer.input.scalar_type() == at::kHalf),
        wanted_(arguments.wanted),
        output_(with_contiguous_rows(arguments.output)),
        gates_(arguments.saved[0].contiguous()),
        cells_(arguments.saved[1].contiguous()),
        hidden_(s.projected ? arguments.saved[2].contiguous() : at::Tensor()),
        grad_output_(arguments.grad_output ? with_contiguous_rows(*arguments.grad_output) : at::Tensor()),
        grad_h_n_(contiguous_or_undefined(arguments.grad_h_n, dtype_)),
        grad_c_n_(contiguous_or_undefined(arguments.grad_c_n, dtype_)),
        gradient_type_(dtype_ == at::kHalf ? at::kFloat : dtype_),
        grads_(wanted_.size()) {
    if (wanted_[0]) grads_[0] = at::empty(s.sequence_sizes(s.input_size), options(dtype_));
    if (wanted_[1] && h0_.defined()) {
      grads_[1] = at::empty({s.directions, s.batch, s.output_size}, options(s.sum_type));
    }
    if (wanted_[2] && c0_.defined()) {
      grads_[2] = at::empty({s.directions, s.batch, s.hidden_size}, options(s.sum_type));
    }
    for (size_t i = 0; i < weights_.size(); ++i) {
      if (wanted_[3 + i]) grads_[3 + i] = at::zeros(weights_[i].sizes(), options(s.sum_type));
    }
    const size_t first = reset_gradients();
    if (resets_.defined() && wanted_.size() > first) {
      if (wanted_[first] && reset_h_.defined()) grads_[first] = at::zeros(reset_h_.sizes(), options(s.sum_type));
      if (wanted_[first + 1] && reset_c_.defined())
        grads_[first + 1] = at::zeros(reset_c_.sizes(), options(s.sum_type));
    }
  }

  std::vector<at::Tensor> run() {
    for (int64_t d = 0; d < s.directions; ++d) {
      if (s.batch == 0) continue;
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "lstm_layer_backward",
                                      [&] { run_direction<typename Stored<scalar_t>::type>(d); });
    }
    for (at::Tensor& grad : grads_) {
      if (grad.defined()) grad = in_type(grad, dtype_);
    }
    return std::move(grads_);
  }

 private:
  // The factors and results of the products over a piece of the sequence.
  struct Gradients {
    at::Tensor gates;                                  // (rows of a piece, 4H)
    at::Tensor output;                                 // (rows of a piece, P), with a projection
    at::Tensor weight_ih, weight_hh, bias, weight_hr;  // sums; undefined where not wanted
  };

  // The place of the gradients of what replaces states.
  size_t reset_gradients() const { return 3 + weights_.size(); }

  at::Tensor operand(const at::Tensor& t) const { return in_type(t, gradient_type_); }

  template <typename T>
  void run_direction(int64_t d) {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const Direction l = direction(d);
    const Steps steps(s, d == 1);
    const int64_t H = s.hidden_size, P = s.output_size;
    const auto saved_rows = [&](const at::Tensor& t) { return part_of(t, d).view({total_rows(), -1}); };
    const at::Tensor gates = saved_rows(gates_), cells = saved_rows(cells_);
    const at::Tensor grad_output = grad_output_.defined() ? grad_output_.narrow(-1, d * P, P) : grad_output_;
    const at::Tensor grad_h_n = part_of(grad_h_n_, d), grad_c_n = part_of(grad_c_n_, d);
    const at::Tensor grad_h0 = part_of(grads_[1], d);
    const at::Tensor grad_c =
        grads_[2].defined() ? grads_[2].select(0, d) : at::empty({s.batch, H}, options(s.sum_type));
    const at::Tensor weight_hh = operand(l.weight_hh);
    const at::Tensor weight_hr = s.projected ? operand(l.weight_hr) : at::Tensor();
    // dL/dh_t through the step after t, and with a projection, dL/d(o * tanh(c_t)).
    const at::Tensor recurrent = at::empty({s.batch, P}, options(s.sum_type));
    const at::Tensor grad_hidden = empty_if(s.projected, {s.batch, H}, options(s.sum_type));

    const int64_t limit = piece_rows(4 * H * static_cast<int64_t>(sizeof(D)));
    std::vector<Piece> pieces;
    int64_t longest = 0;
    for (int64_t n = 0; n < steps.count(); n = pieces.back().end) {
      pieces.emplace_back(steps, n, steps.piece_end(n, limit));
      longest = std::max(longest, steps.offset(pieces.back().finish) - steps.offset(pieces.back().begin));
    }
    Gradients g = gradients(d);
    g.gates = at::empty({longest, 4 * H}, options(gradient_type_));
    if (s.projected) g.output = at::empty({longest, P}, options(gradient_type_));
    at::Tensor grad_reset_h, grad_reset_c;
    if (resets_.defined() && grads_.size() > reset_gradients()) {
      grad_reset_h = part_of(grads_[reset_gradients()], d);
      grad_reset_c = part_of(grads_[reset_gradients() + 1], d);
    }
    // One product makes dL/dh of what replaced states of the sum of the gate gradients in those steps.
    at::Tensor reset_gates;
    if (grad_reset_h.defined()) reset_gates = at::zeros({s.batch, 4 * H}, options(s.sum_type));
    const RowsGemm through_gates = rows_gemm(recurrent, g.gates, weight_hh);
    const std::optional<RowsGemm> to_h0 = rows_gemm_if(grad_h0.defined(), grad_h0, g.gates, weight_hh);
    const std::optional<RowsGemm> projection = rows_gemm_if(s.projected, grad_hidden, g.output, weight_hr);

    for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
      for (int64_t n = piece->end - 1; n >= piece->first; --n) {
        const Step step = steps[n];
        const int64_t place = step.offset - steps.offset(piece->begin);
        const StepRows<T> dy = step_rows<T>(grad_output, step);
        cuda::CellBackward<T> p{};
        p.rows = step.rows;
        p.hidden_size = H;
        p.pre_activations = const_row_pointer<T>(gates, step.offset);
        p.cells = const_row_pointer<A>(cells, step.offset);
        p.c_previous = {step.continuing, const_row_pointer<A>(cells, n > 0 ? steps[n - 1].offset : 0),
                        const_row_pointer<T>(l.c0), resets_of(steps, n), const_row_pointer<T>(l.reset_c)};
        p.reset_gates = row_pointer<A>(reset_gates);
        p.grad_reset_c = row_pointer<A>(grad_reset_c);
        p.going_on = step.going_on;
        p.grad_c_n = const_row_pointer<T>(grad_c_n);
        p.grad_c = row_pointer<A>(grad_c);
        p.grad_gates = row_pointer<D>(g.gates, place);
        if (s.projected) {
          cuda::OutputGradient<T> sum{};
          sum.rows = step.rows;
          sum.output_size = P;
          sum.grad_output = dy.data;
          sum.grad_output_stride = dy.stride;
          sum.grad_h_n = const_row_pointer<T>(grad_h_n);
          sum.recurrent_part = const_row_pointer<A>(recurrent);
          sum.recurrent_rows = step.going_on;
          sum.going_on = step.going_on;
          sum.resets_after = resets_of(steps, n + 1);
          sum.result = row_pointer<D>(g.output, place);
          check(cuda::output_gradient(sum, device_.stream), "output_gradient");
          product((*projection)(0, place, step.rows));
          p.recurrent_part = const_row_pointer<A>(grad_hidden);
          p.recurrent_rows = step.rows;
        } else {
          p.grad_output = dy.data;
          p.grad_output_stride = dy.stride;
          p.grad_h_n = const_row_pointer<T>(grad_h_n);
          p.recurrent_part = const_row_pointer<A>(recurrent);
          p.recurrent_rows = step.going_on;
          p.resets_after = resets_of(steps, n + 1);
        }
        check(cuda::cell_backward(p, device_.stream), "cell_backward");
        const int64_t beginning = step.rows - step.continuing;
        if (step.continuing > 0) product(through_gates(0, place, step.continuing));
        if (beginning > 0 && to_h0) product((*to_h0)(step.continuing, place + step.continuing, beginning));
        if (n == 0 && to_h0 && resets_of(steps, 0).rows > 0) {  // rows that are replaced before their first step
          grad_h0.masked_fill_(resets_.narrow(0, 0, s.packed() ? step.rows : 1).view({step.rows, 1}), 0);
        }
      }
      add_piece<T>(l, steps, *piece, d, g);
    }
    if (reset_gates.defined()) product(grad_reset_h, reset_gates, in_type(l.weight_hh, s.sum_type));
    // Both biases are added to the same sum, so they have the same gradient.
    if (has_bias_) {
      const size_t ih = 3 + d * s.weights_per_direction + 2;
      if (grads_[ih].defined() && grads_[ih + 1].defined()) grads_[ih + 1].copy_(grads_[ih]);
    }
  }

  Gradients gradients(int64_t d) const {
    const at::Tensor* w = grads_.data() + 3 + d * s.weights_per_direction;
    Gradients g;
    g.weight_ih = w[0];
    g.weight_hh = w[1];
    if (has_bias_) g.bias = w[2].defined() ? w[2] : w[3];
    if (s.projected) g.weight_hr = w[s.weights_per_direction - 1];
    return g;
  }

  // The products over the steps of a piece.
  template <typename T>
  void add_piece(const Direction& l, const Steps& steps, const Piece& piece, int64_t d, const Gradients& g) {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const int64_t first = steps.offset(piece.begin);
    const int64_t rows = steps.offset(piece.finish) - first;
    const at::Tensor gates = g.gates.narrow(0, 0, rows);
    if (grads_[0].defined()) {
      const at::Tensor grad_input = grads_[0].view({total_rows(), -1}).narrow(0, first, rows);
      add_input_gradient(grad_input, gates, operand(l.weight_ih), d > 0);
    }
    if (g.weight_ih.defined()) {
      product(g.weight_ih, gates.t(), operand(rows_between(l.input, steps, piece.begin, piece.finish)), true);
    }
    if (g.weight_hh.defined()) add_recurrent_gradient<T>(l, steps, piece, d, gates, g.weight_hh);
    if (g.bias.defined()) {
      const int64_t columns = 4 * s.hidden_size;
      const at::Tensor partial = at::empty({cuda::column_sum_parts(rows), columns}, options(s.sum_type));
      const cuda::ColumnSums<T> sums{rows, columns, const_row_pointer<D>(gates), row_pointer<A>(partial),
                                     row_pointer<A>(g.bias)};
      check(cuda::column_sums(sums, device_.stream), "column_sums");
    }
    if (g.weight_hr.defined()) {
      const at::Tensor hidden = part_of(hidden_, d).view({total_rows(), -1}).narrow(0, first, rows);
      product(g.weight_hr, g.output.narrow(0, 0, rows).t(), operand(hidden), true);
    }
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
    if (s.packed() || resets_.defined()) {
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

  template <typename T>
  at::Tensor previous_outputs(const Direction& l, const Steps& steps, const Piece& piece, int64_t d) const {
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
      for (; n < piece.end && p.steps < p.kSteps; ++n) {
        const Step step = steps[n];
        p.step[p.steps++] = {step.rows, step.continuing, const_row_pointer<T>(h, n > 0 ? steps[n - 1].offset : 0),
                             row_pointer<D>(result, step.offset - first), resets_of(steps, n)};
      }
      check(cuda::previous_outputs(p, device_.stream), "previous_outputs");
    }
    return result;
  }

  const std::vector<bool>& wanted_;
  const at::Tensor output_, gates_, cells_, hidden_;
  const at::Tensor grad_output_, grad_h_n_, grad_c_n_;
  const at::ScalarType gradient_type_;  // as cuda::Types<T>::Gradient
  std::vector<at::Tensor> grads_;       // sums, and that of the input
};

}  // namespace

ForwardResult stepwise_forward(const LayerArguments& layer, const LayerSizes& sizes, bool save,
                               const StepwiseDevice& device) {
  return StepwiseForward(layer, sizes, save, device).run();
}

std::vector<at::Tensor> stepwise_backward(const LayerArguments& layer, const LayerSizes& sizes,
                                          const BackwardArguments& arguments, const StepwiseDevice& device) {
  return StepwiseBackward(layer, sizes, arguments, device).run();
}

}  // namespace lstm_ext
