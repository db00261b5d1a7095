#include "torch/cuda_stepwise_common.h"

namespace lstm_ext {
namespace {

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
        gates_(empty_if(save && !recompute_, s.saved_sizes(4 * s.hidden_size), options(s.gates_type))),
        cells_(empty_if(save, s.saved_sizes(s.hidden_size), options(s.sum_type))),
        hidden_(empty_if(save && !recompute_ && s.projected, s.saved_sizes(s.hidden_size), options(s.gates_type))),
        products_hat_(empty_if(save && !norm_.empty(), s.saved_product_sizes(), options(s.gates_type))),
        factors_(empty_if(save && !norm_.empty(), s.saved_sizes(2), options(s.sum_type))) {
    if (!lengths_.defined()) return;
    // A row of length 0 has no last step.
    const auto begin_from = [](const at::Tensor& state, const at::Tensor& initial) {
      initial.defined() ? state.copy_(initial) : state.zero_();
    };
    begin_from(h_n_, h0_);
    begin_from(c_n_, c0_);
  }

  ForwardResult run() {
    if (s.batch > 0) {
      for (int64_t d = 0; d < s.directions; ++d) {
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "lstm_layer_forward",
                                        [&] { run_direction<typename Stored<scalar_t>::type>(d); });
      }
    }
    std::vector<at::Tensor> saved;
    for (const at::Tensor& t : {gates_, cells_, hidden_, products_hat_, factors_}) {
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

  // U h of states that do not come from the step before, for all rows at once.
  at::Tensor recurrent_part_of(const at::Tensor& state, const Direction& l) const {
    if (!state.defined()) return {};
    const at::Tensor result = at::empty({s.batch, 4 * s.hidden_size}, options(s.sum_type));
    product(result, masked(state, l.mask), l.weight_hh.t());
    return result;
  }

  // What the steps of a direction leave to each other, and hand to the products between them.
  struct Buffers {
    at::Tensor output, h_n, c_n;
    at::Tensor gates, input_hat, recurrent_hat, factors;
    at::Tensor cells, hidden;  // of all steps if they are saved, else of one
    at::Tensor recurrent, begin_part, reset_part;
    at::Tensor projected;            // with a projection and something to do after it
    at::Tensor h_carried, h_masked;  // as in cuda::NewOutput
    at::Tensor norm_workspace;
  };

  Buffers buffers(const Direction& l, int64_t d) const {
    const int64_t H = s.hidden_size, P = s.output_size;
    const auto of_step = [&](bool there, int64_t features, at::ScalarType type) {
      return empty_if(there, {s.batch, features}, options(type));
    };
    Buffers b;
    b.output = output_.view({total_rows(), -1}).narrow(1, d * P, P);
    b.h_n = h_n_.select(0, d);
    b.c_n = c_n_.select(0, d);
    b.gates = saved_rows(gates_, d);
    b.input_hat = saved_rows(products_hat_, d);
    b.recurrent_hat = saved_rows(products_hat_, s.directions + d);
    b.factors = saved_rows(factors_, d);
    b.cells = cells_.defined() ? saved_rows(cells_, d) : of_step(true, H, s.sum_type);
    if (s.projected) b.hidden = hidden_.defined() ? saved_rows(hidden_, d) : of_step(true, H, dtype_);
    b.recurrent = of_step(true, 4 * H, s.sum_type);
    b.begin_part = recurrent_part_of(l.h0, l);
    b.reset_part = recurrent_part_of(l.reset_h, l);
    b.projected = of_step(s.projected && (lengths_.defined() || mask_.defined() || keeps_h()), P, s.sum_type);
    b.h_carried = of_step(keeps_h(), P, s.sum_type);
    b.h_masked = of_step(mask_.defined(), P, dtype_);
    b.norm_workspace = of_step(l.normalised(), 2 * H, s.sum_type);
    return b;
  }

  template <typename T>
  cuda::NewOutput<T> new_output(const Direction& l, const Buffers& b, const Step& step) const {
    using A = typename cuda::Types<T>::Accumulate;
    cuda::NewOutput<T> p{};
    p.h = row_pointer<T>(b.output, step.offset);
    p.h_stride = b.output.stride(0);
    p.h_n = row_pointer<T>(b.h_n);
    p.h_carried = row_pointer<A>(b.h_carried);
    p.zoneout = zoneout_h<A>(l, step);
    p.h0 = const_row_pointer<T>(l.h0);
    p.reset_h = const_row_pointer<T>(l.reset_h);
    p.mask = const_row_pointer<A>(l.mask);
    p.masked = row_pointer<T>(b.h_masked);
    return p;
  }

  template <typename T>
  void run_direction(int64_t d) {
    using A = typename cuda::Types<T>::Accumulate;
    const Direction l = direction(d);
    const Steps steps(s, d == 1);
    const Buffers b = buffers(l, d);
    const int64_t H = s.hidden_size;
    const bool save = cells_.defined();
    const RowsGemm from_output = rows_gemm(b.recurrent, l.mask.defined() ? b.h_masked : b.output, l.weight_hh.t());
    const std::optional<RowsGemm> projection =
        rows_gemm_if(s.projected, b.projected.defined() ? b.projected : b.output, b.hidden, transposed(l.weight_hr));

    const int64_t limit = piece_rows(4 * H * static_cast<int64_t>(sizeof(A)));
    for (int64_t n = 0; n < steps.count();) {
      const Piece piece(steps, n, steps.piece_end(n, limit));
      const InputPart input = input_part(l, steps, piece);
      for (; n < piece.end; ++n) {
        const Step step = steps[n];
        const Step before = n > 0 ? steps[n - 1] : Step{};
        if (step.continuing > 0) product(from_output(0, l.mask.defined() ? 0 : before.offset, step.continuing));
        cuda::CellForward<T> p{};
        p.of = rows_of(steps, n, step);
        p.hidden_size = H;
        p.input_part = const_row_pointer<A>(input.rows, input.first_of_step(steps, piece, step));
        p.input_stride = input.stride * 4 * H;
        p.recurrent_part = const_row_pointer<A>(b.recurrent);
        p.begin_part = const_row_pointer<A>(b.begin_part);
        p.reset_part = const_row_pointer<A>(b.reset_part);
        p.bias_ih = const_row_pointer<T>(l.bias_ih);
        p.bias_hh = const_row_pointer<T>(l.bias_hh);
        p.c_previous = {const_row_pointer<A>(b.cells, save ? before.offset : 0), const_row_pointer<T>(l.c0),
                        const_row_pointer<T>(l.reset_c)};
        p.zoneout = zoneout_c<A>(l, step);
        p.c = row_pointer<A>(b.cells, save ? step.offset : 0);
        p.c_n = row_pointer<T>(b.c_n);
        p.pre_activations = row_pointer<T>(b.gates, step.offset);
        const int64_t place = hidden_.defined() ? step.offset : 0;
        if (s.projected) {
          p.output.h = row_pointer<T>(b.hidden, place);
          p.output.h_stride = H;
        } else {
          p.output = new_output<T>(l, b, step);
        }
        start(p, l, b, step);
        if (projection) project<T>(*projection, l, b, step, p.of, place);
      }
    }
  }

  template <typename T>
  void start(const cuda::CellForward<T>& cell, const Direction& l, const Buffers& b, const Step& step) const {
    using A = typename cuda::Types<T>::Accumulate;
    if (!l.normalised()) {
      check(cuda::cell_forward(cell, device_.stream), "cell_forward");
      return;
    }
    cuda::NormCellForward<T> p{};
    p.cell = cell;
    p.gain_ih = const_row_pointer<A>(l.gain_ih);
    p.gain_hh = const_row_pointer<A>(l.gain_hh);
    p.gain_c = const_row_pointer<A>(l.gain_c);
    p.bias_c = const_row_pointer<A>(l.bias_c);
    p.input_hat = row_pointer<T>(b.input_hat, step.offset);
    p.recurrent_hat = row_pointer<T>(b.recurrent_hat, step.offset);
    p.factors = row_pointer<A>(b.factors, step.offset);
    p.workspace = row_pointer<A>(b.norm_workspace);
    check(cuda::norm_cell_forward(p, device_.stream), "norm_cell_forward");
  }

  // `place`: of the step in b.hidden.
  template <typename T>
  void project(const RowsGemm& projection, const Direction& l, const Buffers& b, const Step& step,
               const cuda::RowsOfStep& rows, int64_t place) const {
    using A = typename cuda::Types<T>::Accumulate;
    if (b.projected.defined()) {
      product(projection(0, place, step.rows));
      const cuda::OutputForward<T> p{rows, s.output_size, const_row_pointer<A>(b.projected), new_output<T>(l, b, step)};
      check(cuda::output_forward(p, device_.stream), "output_forward");
      return;
    }
    product(projection(step.offset, place, step.rows));
    const int64_t ending = step.rows - step.going_on;
    if (ending > 0) {
      b.h_n.narrow(0, step.going_on, ending).copy_(b.output.narrow(0, step.offset + step.going_on, ending));
    }
  }

  const at::Tensor output_, h_n_, c_n_;
  const at::Tensor gates_, cells_, hidden_, products_hat_, factors_;  // undefined where not saved
};

}  // namespace

ForwardResult stepwise_forward(const LayerArguments& layer, const LayerSizes& sizes, bool save,
                               const StepwiseDevice& device) {
  return StepwiseForward(layer, sizes, save, device).run();
}

}  // namespace lstm_ext
