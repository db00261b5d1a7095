#include <list>

#include "torch/cuda_chunk_gradients.h"
#include "torch/cuda_persistent.h"

namespace lstm_ext {
namespace {

// One step of a sequence (T, B, n) or (N, n): the first row, and the row stride.
template <typename T>
struct StepData {
  const T* data;
  int64_t stride;
};
template <typename T>
StepData<T> step_data(const at::Tensor& sequence, const Step& step) {
  if (!sequence.defined()) return {nullptr, 0};
  const int64_t first = sequence.dim() == 3 ? step.time : step.offset;
  return {row_pointer<const T>(sequence, first), sequence.stride(-2)};
}

class StepwiseBackward : ChunkGradients {
 public:
  StepwiseBackward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args,
                   const StepwiseDevice& device)
      : ChunkGradients(call, sizes, args, device),
        grad_output_(with_contiguous_rows(materialized(args.grads.output))),
        grad_h_n_(contiguous_or_undefined(args.grads.h_n, dtype_)),
        grad_c_n_(contiguous_or_undefined(args.grads.c_n, dtype_)),
        grad_gate_values_(contiguous_or_undefined(args.grads.gate_values, sizes.gates_type)),
        grad_cells_(contiguous_or_undefined(args.grads.cells, sizes.sum_type)) {}

  LayerGradients run() {
    if (sizes_.batch > 0) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "lstm_layer_backward",
                                      [&] { run_steps<typename Stored<scalar_t>::type>(); });
    }
    return std::move(grads_);
  }

 private:
  // The tensors that one product reads and writes for both directions, if there is such a product.
  struct Both {
    at::Tensor recurrent_part, recurrent;
  };

  Buffers buffers(const Direction& layer, const DirectionInputs& g, int64_t chunk, int64_t d, Both& both) const {
    const int64_t H = sizes_.hidden_size, P = sizes_.output_size;
    if (one_product() && d == 0) {
      both.recurrent_part = at::empty({2, chunk, 4 * H}, options(gradient_type()));
      both.recurrent = at::empty({2, sizes_.batch, P}, options(sizes_.sum_type));
    }
    const auto of_chunk = [&](bool there, int64_t features, at::ScalarType type) {
      return empty_if(there, {chunk, features}, options(type));
    };
    const auto of_step = [&](bool there, int64_t features) {
      return empty_if(there, {sizes_.batch, features}, options(sizes_.sum_type));
    };
    Buffers b;
    b.recurrent_part =
        one_product() ? both.recurrent_part.select(0, d) : of_chunk(!mails_recurrent_part(), 4 * H, gradient_type());
    b.input_part = of_chunk(layer.normalised(), 4 * H, gradient_type());
    b.preactivations = of_chunk(layer.normalised(), 4 * H, sizes_.sum_type);
    b.tanh_input = of_chunk(layer.normalised(), H, sizes_.sum_type);
    b.norm_cell = of_chunk(layer.normalised(), H, dtype_);
    b.cell_terms = of_chunk(!options_.peephole.empty(), cell::kParameters * H, sizes_.sum_type);
    b.output = of_chunk(sizes_.projected, P, gradient_type());
    b.hidden = of_chunk(g.weight_hr.defined() && !saved_.hidden.defined(), H, dtype_);
    b.recurrent = one_product() ? both.recurrent.select(0, d) : of_step(!fused_ && !persistent_, P);
    if (fused_ && sizes_.steps > 1) {
      for (at::Tensor& t : b.parts) t = at::empty({cuda::step_parts(H), sizes_.batch, H}, options(sizes_.sum_type));
    }
    b.grad_hidden = of_step(sizes_.projected, H);
    b.grad_c = g.c0.defined() ? g.c0 : of_step(true, H);
    b.grad_h = of_step(has_zoneout_h(), P);
    b.begin_part = empty_if(g.h0.defined(), {sizes_.batch, 4 * H}, options(gradient_type()));
    b.reset_part = zeros_if(g.reset_h.defined(), {sizes_.batch, 4 * H}, options(sizes_.sum_type));
    if (options_.lengths.defined()) {  // rows of length 0 have no step that writes these
      for (const at::Tensor& t : {b.grad_c, b.grad_h, b.begin_part}) {
        if (t.defined()) t.zero_();
      }
    }
    return b;
  }

  // Whether recurrent_part itself serves as the mailbox of a persistent kernel: its rows are whole pieces, and mailed
  // numbers are not rounded.
  bool mails_recurrent_part() const {
    return persistent_ && gradient_type() != at::kFloat &&
           aligned_length(sizes_.hidden_size, c10::elementSize(gradient_type())) == sizes_.hidden_size;
  }

  // The chunks of each direction.
  std::vector<std::vector<Chunk>> chunks_of(const std::vector<Steps>& directions) const {
    // The bytes of Buffers for each row of a chunk.
    const auto gradient = static_cast<int64_t>(c10::elementSize(gradient_type()));
    const auto sum = static_cast<int64_t>(c10::elementSize(sizes_.sum_type));
    int64_t bytes = 4 * sizes_.hidden_size * gradient;
    if (!options_.peephole.empty()) bytes += cell::kParameters * sizes_.hidden_size * sum;
    if (!options_.norm.empty()) bytes += 4 * sizes_.hidden_size * (gradient + sum);
    if (options_.recompute) bytes += 4 * sizes_.hidden_size * sum;
    const int64_t limit = chunk_rows(device_.chunk_bytes, bytes);
    std::vector<std::vector<Chunk>> chunks(directions.size());
    for (int64_t n = 0; n < sizes_.steps; n = chunks[0].back().end) {
      const std::vector<Chunk> next = chunk_at(directions, n, limit);
      for (size_t d = 0; d < next.size(); ++d) chunks[d].push_back(next[d]);
    }
    return chunks;
  }

  // (H, 4, H rounded up to whole pieces) of U (4H, H), transposed once a call: each launch of a persistent kernel then
  // reads 16 bytes at once, and not single numbers that are a row apart.
  static at::Tensor columns_of_gates(const at::Tensor& weight) {
    const int64_t H = weight.size(1);
    const at::Tensor columns = at::zeros({H, 4, aligned_length(H, weight.element_size())}, weight.options());
    columns.narrow(2, 0, H).copy_(weight.unflatten(0, {4, H}).permute({2, 0, 1}));
    return columns;
  }

  // A direction while its steps run. It must not be moved: `steps` refers to `layer`.
  struct Running {
    Running(const StepwiseBackward& pass, int64_t direction, std::vector<Chunk> its_chunks, Both& both)
        : d(direction),
          layer(pass.direction(d)),
          steps(layer.steps()),
          gradients(pass.inputs_of(pass.grads_, d)),
          weight_hh(pass.one_product() ? pass.both_weight_hh_.select(0, d) : pass.operand(layer.weight_hh)),
          weight_hr(pass.sizes_.projected ? pass.operand(layer.weight_hr) : at::Tensor()),
          step_weight(pass.persistent_ ? columns_of_gates(weight_hh)
                      : pass.fused_    ? with_aligned_rows(weight_hh)
                                       : at::Tensor()),
          chunks(std::move(its_chunks)),
          buffers(pass.buffers(layer, gradients, longest(), d, both)),
          through_gates(
              pass.rows_gemm_if(buffers.recurrent.defined(), buffers.recurrent, buffers.recurrent_part, weight_hh)),
          projection(pass.rows_gemm_if(pass.sizes_.projected, buffers.grad_hidden, buffers.output, weight_hr)),
          preactivations(pass.rows_of_direction(pass.saved_.gates, d)),
          cells(pass.rows_of_direction(pass.saved_.cells, d)),
          grad_output(pass.grad_output_.defined()
                          ? pass.grad_output_.narrow(-1, d * pass.sizes_.output_size, pass.sizes_.output_size)
                          : at::Tensor()),
          grad_h_n(part_of(pass.grad_h_n_, d)),
          grad_c_n(part_of(pass.grad_c_n_, d)),
          grad_gate_values(pass.rows_of_direction(pass.grad_gate_values_, d)),
          grad_cells(pass.rows_of_direction(pass.grad_cells_, d)) {}

    const Chunk& running() const { return chunks.back(); }
    // The row of the chunk's mail with which the pass's next chunk begins: that of the first step.
    int64_t row_left() const {
      return steps.rows_before(steps.time(running().first)) - steps.rows_before(running().begin);
    }
    int64_t longest() const {
      int64_t rows = 0;
      for (const Chunk& c : chunks) rows = std::max(rows, steps.rows_before(c.finish) - steps.rows_before(c.begin));
      return rows;
    }

    const int64_t d;
    const Direction layer;
    const Steps steps;
    const DirectionInputs gradients;
    const at::Tensor weight_hh, weight_hr;  // kept here, because products hold pointers only
    const at::Tensor step_weight;           // the same in the layout of the fused and persistent kernels
    std::vector<Chunk> chunks;              // chunks that have yet to run; the last one is running
    Buffers buffers;
    const std::optional<RowsGemm> through_gates, projection;
    const at::Tensor preactivations, cells;
    const at::Tensor grad_output, grad_h_n, grad_c_n, grad_gate_values, grad_cells;
    at::Tensor recomputed;       // preactivations of the running chunk
    const void* left = nullptr;  // persistent: the gates' gradients that the pass's previous chunk left
  };

  // Both directions share their launches.
  template <typename T>
  void run_steps() {
    std::list<Running> sides;
    Both both;
    std::vector<LayerShape> shapes;
    for (int64_t d = 0; d < sizes_.directions; ++d) shapes.push_back(sizes_.shape(d, options_.resets));
    std::vector<Steps> directions;
    for (const LayerShape& shape : shapes) directions.emplace_back(shape, Steps::Pass::kForward);
    std::vector<std::vector<Chunk>> chunks = chunks_of(directions);
    for (int64_t d = 0; d < sizes_.directions; ++d) sides.emplace_back(*this, d, std::move(chunks[d]), both);
    std::optional<PersistentLaunches> launches;
    if (persistent_) launches.emplace(*persistent_, device_, input_.options());
    // The directions reach a time in different chunks, so both accumulate.
    if (sizes_.directions == 2 && grads_.input.defined()) grads_.input.zero_();
    const int64_t last = sides.front().steps.count() - 1;
    for (int64_t n = last; n >= 0; --n) {
      const bool begins = n == sides.front().chunks.back().end - 1;
      for (Running& side : sides) {
        if (options_.recompute && begins) {
          side.recomputed = preactivations_of<T>(side.layer, side.steps, side.running(), side.d);
        }
      }
      if constexpr (kHasStep<T>) {
        if (persistent_ && begins) run_chunk<T>(sides, *launches);
      }
      if (sizes_.projected) project<T>(sides, n);
      // The first kernel may follow the one that writes step_weight, which a dependent kernel would read too early.
      if (!persistent_) run_step<T>(sides, n, dependent_ && n < last);
      for (Running& side : sides) {
        if (n > side.running().first) continue;
        add_chunk<T>(side.layer, side.steps, side.running(), side.d, side.buffers, side.gradients);
        side.chunks.pop_back();
      }
    }
    for (const Running& side : sides) {
      finish_states(side.layer, side.buffers, side.gradients, side.grad_h_n, side.grad_c_n, side.weight_hh);
    }
  }

  // The row of the chunk's buffers at which a step begins.
  static int64_t row_in_chunk(const Running& side, const Step& step) {
    return step.offset - side.steps.rows_before(side.running().begin);
  }

  // Computes dL/d(o * tanh(c_t)) of a step.
  template <typename T>
  void project(const std::list<Running>& sides, int64_t n) const {
    using D = typename cuda::Types<T>::Gradient;
    cuda::StepSides<cuda::OutputGradient<T>> outputs{};
    cuda::StepSides<Gemm> multiplied{};
    for (const Running& side : sides) {
      const Step step = step_at(side.steps, n);
      const int64_t row = row_in_chunk(side, step);
      outputs.add({step_rows(side.layer, n), sizes_.output_size, output_of<T>(side, n),
                   row_pointer<D>(side.buffers.output, row)});
      multiplied.add((*side.projection)(0, row, step.rows));
    }
    check(cuda::output_gradient(outputs, device_.stream), "output_gradient");
    products(multiplied);
  }

  // Runs all steps of the chunk in one launch.
  template <typename T>
  void run_chunk(std::list<Running>& sides, PersistentLaunches& launches) const {
    using D = typename cuda::Types<T>::Gradient;
    const auto args_of = [&](Running& side, int64_t offset) {
      if (mails_recurrent_part()) {
        side.buffers.recurrent_part =
            launches.matrix(offset, launches.rows_of(side), 4 * sizes_.hidden_size, gradient_type());
      }
      return persistent_args<T>(side);
    };
    launches.run<D>(&cuda::persistent_backward<T>, "persistent_backward", sides, 4, sizes_.hidden_size, args_of);
  }

  template <typename T>
  cuda::PersistentBackward<T> persistent_args(const Running& side) const {
    using D = typename cuda::Types<T>::Gradient;
    cuda::PersistentBackward<T> args{};
    const Chunk& chunk = side.running();
    args.cell = cell_of<T>(side, side.steps.time(chunk.begin));
    args.cell.c_previous.previous = args.cell.cells;
    args.cell.grad_recurrent_part = mails_recurrent_part() ? nullptr : row_pointer<D>(side.buffers.recurrent_part);
    args.cell.hidden = nullptr;
    args.steps = chunk_of_steps(side.steps, chunk, side.layer.shape.reverse, sizes_.batch);
    if (options_.resets.defined()) args.resets = side.layer.shape.resets + side.steps.rows_before(chunk.begin);
    args.grad_output_by_time = side.grad_output.defined() && side.grad_output.dim() == 3;
    if (args.grad_output_by_time) {
      args.cell.output.grad_output = row_pointer<const T>(side.grad_output);
      args.grad_output_time_stride = side.grad_output.stride(0);
    }
    args.weight = row_pointer<const D>(side.step_weight);
    return args;
  }

  template <typename T>
  void run_step(const std::list<Running>& sides, int64_t n, bool dependent) const {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    cuda::StepSides<cuda::StepBackward<T>> fused{};
    cuda::StepSides<cuda::CellBackward<T>> cells{};
    cuda::StepSides<cuda::NormCellBackward<T>> norm_cells{};
    cuda::StepSides<Gemm> multiplied{};
    for (const Running& side : sides) {
      const Step step = step_at(side.steps, n);
      const int64_t row = row_in_chunk(side, step);
      const cuda::CellBackward<T> cell = cell_of<T>(side, n);
      const bool multiplies = step.previous_rows > 0;
      if (multiplies && fused_) {
        fused.add({cell, row_pointer<const D>(side.step_weight), side.step_weight.stride(0), step.previous_rows,
                   row_pointer<A>(side.buffers.parts[(n - 1) % 2])});
        continue;
      }
      if (side.layer.normalised()) {
        norm_cells.add(norm_cell_of<T>(cell, side, step));
      } else {
        cells.add(cell);
      }
      if (multiplies) multiplied.add((*side.through_gates)(0, row, step.previous_rows));
    }
    if (cells.count > 0) check(cuda::cell_backward(cells, device_.stream), "cell_backward");
    if (norm_cells.count > 0) check(cuda::norm_cell_backward(norm_cells, device_.stream), "norm_cell_backward");
    if constexpr (kHasStep<T>) {
      if (fused.count > 0) check(cuda::step_backward(fused, dependent, device_.stream), "step_backward");
    }
    products(multiplied);
  }

  template <typename T>
  cuda::CellBackward<T> cell_of(const Running& side, int64_t n) const {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const Step step = step_at(side.steps, n);
    const int64_t row = row_in_chunk(side, step);
    const Buffers& b = side.buffers;
    cuda::CellBackward<T> args{};
    args.rows = step_rows(side.layer, n);
    args.hidden_size = sizes_.hidden_size;
    args.preactivations = options_.recompute ? row_pointer<const T>(side.recomputed, row)
                                             : row_pointer<const T>(side.preactivations, step.offset);
    args.cells = row_pointer<const A>(side.cells, step.offset);
    args.c_previous = {row_pointer<const A>(side.cells, previous_offset(side.steps, n)),
                       row_pointer<const T>(side.layer.c0), row_pointer<const T>(side.layer.reset_c)};
    args.zoneout = zoneout_c<A>(side.layer, step);
    args.options = cell_options<A>(side.d);
    args.cell_terms = row_pointer<A>(b.cell_terms, row);
    args.grad_c_n = row_pointer<const T>(side.grad_c_n);
    args.grad_gate_values = row_pointer<const T>(side.grad_gate_values, step.offset);
    args.grad_cells = row_pointer<const A>(side.grad_cells, step.offset);
    args.grad_c = row_pointer<A>(b.grad_c);
    args.grad_recurrent_part = row_pointer<D>(b.recurrent_part, row);
    args.grad_begin_part = row_pointer<D>(b.begin_part);
    args.grad_reset_part = row_pointer<A>(b.reset_part);
    args.grad_reset_c = row_pointer<A>(side.gradients.reset_c);
    args.hidden = row_pointer<T>(b.hidden, row);
    if (sizes_.projected) {
      args.grad_hidden = row_pointer<const A>(b.grad_hidden);
    } else {
      args.output = output_of<T>(side, n);
    }
    return args;
  }

  template <typename T>
  cuda::GradOutput<T> output_of(const Running& side, int64_t n) const {
    using A = typename cuda::Types<T>::Accumulate;
    const Step step = step_at(side.steps, n);
    const Buffers& b = side.buffers;
    const StepData<T> dy = step_data<T>(side.grad_output, step);
    cuda::GradOutput<T> dh{};
    dh.grad_output = dy.data;
    dh.grad_output_stride = dy.stride;
    dh.grad_h_n = row_pointer<const T>(side.grad_h_n);
    dh.recurrent_part = row_pointer<const A>(fused_ ? b.parts[n % 2] : b.recurrent);
    dh.recurrent_parts = fused_ ? cuda::step_parts(sizes_.hidden_size) : 1;
    dh.recurrent_part_stride = step.next_rows * sizes_.hidden_size;
    dh.recurrent_mask = row_pointer<const A>(side.layer.recurrent_mask);
    dh.zoneout = zoneout_h<A>(side.layer, step);
    dh.grad_h = row_pointer<A>(b.grad_h);
    dh.grad_reset_h = row_pointer<A>(side.gradients.reset_h);
    return dh;
  }

  template <typename T>
  cuda::NormCellBackward<T> norm_cell_of(const cuda::CellBackward<T>& cell, const Running& side,
                                         const Step& step) const {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const Buffers& b = side.buffers;
    const int64_t row = row_in_chunk(side, step);
    cuda::NormCellBackward<T> args{};
    args.cell = cell;
    args.norm = layer_norm<A>(side.layer, options_);
    args.norm_input = row_pointer<const T>(rows_of_direction(saved_.norm_products, side.d), step.offset);
    args.norm_recurrent =
        row_pointer<const T>(rows_of_direction(saved_.norm_products, sizes_.directions + side.d), step.offset);
    args.norm_factors = row_pointer<const A>(rows_of_direction(saved_.norm_factors, side.d), step.offset);
    args.grad_input_part = row_pointer<D>(b.input_part, row);
    args.grad_preactivations = row_pointer<A>(b.preactivations, row);
    args.grad_tanh_input = row_pointer<A>(b.tanh_input, row);
    args.norm_cell = row_pointer<T>(b.norm_cell, row);
    return args;
  }

  // Computes dL/dh of h0 and of reset_h, each by one product for all steps.
  void finish_states(const Direction& layer, const Buffers& b, const DirectionInputs& g, const at::Tensor& grad_h_n,
                     const at::Tensor& grad_c_n, const at::Tensor& weight_hh) const {
    const auto through_product = [&](const at::Tensor& result, const at::Tensor& grad, const at::Tensor& weight) {
      product(result, grad, weight);
      if (layer.recurrent_mask.defined()) result.mul_(layer.recurrent_mask);
    };
    if (g.h0.defined()) {
      through_product(g.h0, b.begin_part, weight_hh);
      if (b.grad_h.defined()) g.h0.add_(b.grad_h);
    }
    if (g.reset_h.defined()) {
      // The kernels have added the part through zoneout already.
      const at::Tensor sum = has_zoneout_h() ? at::empty_like(g.reset_h) : g.reset_h;
      through_product(sum, b.reset_part, in_type(layer.weight_hh, sizes_.sum_type));
      if (has_zoneout_h()) g.reset_h.add_(sum);
    }
    if (!options_.lengths.defined()) return;
    // The final state of a row of length 0 is its initial one.
    const at::Tensor has_steps = options_.lengths.gt(0).unsqueeze(1);
    const auto add_where_empty = [&](const at::Tensor& initial, const at::Tensor& last) {
      if (initial.defined() && last.defined()) initial.add_(last.to(sizes_.sum_type).masked_fill(has_steps, 0));
    };
    add_where_empty(g.h0, grad_h_n);
    add_where_empty(g.c0, grad_c_n);
  }

  const at::Tensor grad_output_, grad_h_n_, grad_c_n_, grad_gate_values_, grad_cells_;
};

}  // namespace

LayerGradients stepwise_backward(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args,
                                 const StepwiseDevice& device) {
  return without_refused(
      device, [&](const StepwiseDevice& chosen) { return StepwiseBackward(call, sizes, args, chosen).run(); });
}

}  // namespace lstm_ext
