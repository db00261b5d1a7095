#include <list>
#include <tuple>

#include "torch/cuda_persistent.h"

namespace lstm_ext {
namespace {

// W x_t for a chunk; `stride` is the number of rows between steps.
struct InputPart {
  at::Tensor rows;
  int64_t stride;
  bool batch_first;

  int64_t first_row(const Steps& steps, const Chunk& chunk, const Step& step) const {
    return batch_first ? step.time : step.offset - steps.rows_before(chunk.begin);
  }
};

// The fused steps of the next launch, and the tensors that they read and nobody else keeps.
template <typename T>
struct FusedSteps {
  // Adds a step with U h_{t-1}, which begins at row `first` of `h`.
  void add(const cuda::CellForward<T>& cell, const at::Tensor& weight, const at::Tensor& h, int64_t first,
           int64_t rows) {
    sides.add({cell, {product(weight, h, first, rows), {}}, false});
  }

  // Adds the only step of a sequence: W x and, if there is a state, U h. `reset_h` replaces h in the rows of
  // cell.rows.resets.
  void add_whole(const cuda::CellForward<T>& cell, const Direction& layer, const at::Tensor& weight,
                 const at::Tensor& h, const at::Tensor& reset_h) {
    const at::Tensor x = with_aligned_rows(layer.input.dim() == 3 ? layer.input.select(0, 0) : layer.input);
    const at::Tensor weight_ih = with_aligned_rows(layer.weight_ih);
    const int64_t rows = x.size(0);
    cuda::StepForward<T> step{cell, {product(weight_ih, x, 0, rows), {}}, true};
    kept.insert(kept.end(), {x, weight_ih});
    if (h.defined() || reset_h.defined()) {
      cuda::StepProduct<T>& of_state = step.products[1];
      of_state = product(weight, aligned(h), 0, rows);
      of_state.resets = cell.rows.resets;
      const at::Tensor in_place = aligned(reset_h);
      of_state.reset_rows = row_pointer<const T>(in_place);
      of_state.reset_stride = row_stride(in_place);
    }
    sides.add(step);
  }

  static cuda::StepProduct<T> product(const at::Tensor& weight, const at::Tensor& rows, int64_t first, int64_t count) {
    return {row_pointer<const T>(weight),
            weight.stride(0),
            row_pointer<const T>(rows, first),
            row_stride(rows),
            count,
            weight.size(1),
            {nullptr, 0},
            nullptr,
            0};
  }
  static int64_t row_stride(const at::Tensor& rows) { return rows.defined() ? rows.stride(0) : 0; }
  at::Tensor aligned(const at::Tensor& rows) {
    if (!rows.defined()) return rows;
    kept.push_back(with_aligned_rows(rows));
    return kept.back();
  }

  cuda::StepSides<cuda::StepForward<T>> sides{};
  std::vector<at::Tensor> kept;
};

class StepwiseForward : Stepwise {
 public:
  StepwiseForward(const LayerCall& call, const LayerSizes& sizes, bool save, const StepwiseDevice& device)
      : Stepwise(call, sizes, nullptr, device, device.tf32),
        output_(at::empty(sizes.sequence_sizes(sizes.directions * sizes.output_size), options(dtype_))),
        h_n_(at::empty({sizes.directions, sizes.batch, sizes.output_size}, options(dtype_))),
        c_n_(at::empty({sizes.directions, sizes.batch, sizes.hidden_size}, options(dtype_))),
        saved_(save ? sizes.empty_saved(call, input_.options()) : Saved{}),
        whole_(fused_ && sizes.steps == 1),
        both_recurrent_(empty_if(one_product(), {2, sizes.batch, 4 * sizes.hidden_size}, options(sizes.sum_type))),
        both_h_(empty_if(one_product(), {2, sizes.batch, sizes.output_size}, options(dtype_))) {
    if (!options_.lengths.defined()) return;
    // A row of length 0 has no last step.
    const auto begin_from = [](const at::Tensor& state, const at::Tensor& initial) {
      initial.defined() ? state.copy_(initial) : state.zero_();
    };
    begin_from(h_n_, call_.h0);
    begin_from(c_n_, call_.c0);
  }

  LayerResults run() {
    if (sizes_.batch > 0) {
      AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype_, "lstm_layer_forward",
                                      [&] { run_steps<typename Stored<scalar_t>::type>(); });
    }
    return {output_, h_n_, c_n_, saved_};
  }

 private:
  InputPart input_part(const Direction& layer, const Steps& steps, const Chunk& chunk) const {
    const int64_t batch = sizes_.batch;
    const auto result = [&](const at::Tensor& x, int64_t stride, bool batch_first) {
      const at::Tensor rows = at::empty({x.size(0), 4 * sizes_.hidden_size}, options(sizes_.sum_type));
      product(rows, x, layer.weight_ih.t());
      return InputPart{rows, stride, batch_first};
    };
    // Batch-first data of the whole sequence is used in place.
    const at::Tensor& x = layer.input;
    const bool whole = chunk.begin == 0 && chunk.finish == sizes_.steps;
    if (!sizes_.packed() && whole && batch > 1 && x.stride(0) == x.size(2) && x.stride(1) == sizes_.steps * x.size(2)) {
      return result(x.transpose(0, 1).flatten(0, 1), sizes_.steps, true);
    }
    return result(rows_between(x, steps, chunk.begin, chunk.finish), 1, false);
  }

  // The masked state that is multiplied with U, or undefined.
  at::Tensor masked_state(const at::Tensor& state, const Direction& layer) const {
    const at::Tensor& mask = layer.recurrent_mask;
    if (!state.defined() || !mask.defined()) return state;
    return state.to(sizes_.sum_type).mul(mask).to(dtype_);
  }

  // U h for states that do not come from the previous step, for all rows at once.
  at::Tensor recurrent_part_of(const at::Tensor& state, const Direction& layer) const {
    if (!state.defined()) return {};
    const at::Tensor h = masked_state(state, layer);
    const at::Tensor result = at::empty({sizes_.batch, 4 * sizes_.hidden_size}, options(sizes_.sum_type));
    product(result, h, layer.weight_hh.t());
    return result;
  }

  // The data that the steps of a direction pass to each other, and to the products between them.
  struct Buffers {
    at::Tensor output, h_n, c_n;
    at::Tensor preactivations, norm_input, norm_recurrent, norm_factors;
    at::Tensor cells, hidden;  // all steps if they are saved, else one step
    at::Tensor recurrent, begin_part, reset_part;
    at::Tensor projected;  // with a projection, if something follows it
    at::Tensor running_h;  // see cuda::NewOutput
    // See cuda::NewOutput. Used if the product of the next step does not read rows of `output`: with a mask, if rows
    // may begin anywhere, and if one product reads both directions, whose rows are at different times in `output`.
    // Fused steps use two of them in turn, because other blocks still read the previous step while a block writes its
    // own.
    at::Tensor recurrent_h[2];
    at::Tensor norm_workspace;
  };

  Buffers buffers(const Direction& layer, int64_t d) const {
    const int64_t H = sizes_.hidden_size, P = sizes_.output_size;
    const at::ScalarType sum_type = sizes_.sum_type;
    const auto one_step = [&](bool there, int64_t features, at::ScalarType type) {
      return empty_if(there, {sizes_.batch, features}, options(type));
    };
    Buffers b;
    b.output = output_.view({total_rows(), -1}).narrow(1, d * P, P);
    b.h_n = h_n_.select(0, d);
    b.c_n = c_n_.select(0, d);
    b.preactivations = rows_of_direction(saved_.gates, d);
    b.norm_input = rows_of_direction(saved_.norm_products, d);
    b.norm_recurrent = rows_of_direction(saved_.norm_products, sizes_.directions + d);
    b.norm_factors = rows_of_direction(saved_.norm_factors, d);
    b.cells = saved_.cells.defined() ? rows_of_direction(saved_.cells, d) : one_step(true, H, sum_type);
    if (sizes_.projected) {
      b.hidden = saved_.hidden.defined() ? rows_of_direction(saved_.hidden, d) : one_step(true, H, dtype_);
    }
    b.recurrent = one_product() ? both_recurrent_.select(0, d) : one_step(!fused_ && !persistent_, 4 * H, sum_type);
    if (!whole_) {
      b.begin_part = recurrent_part_of(layer.h0, layer);
      b.reset_part = recurrent_part_of(layer.reset_h, layer);
    }
    const bool changes_output = options_.lengths.defined() || options_.recurrent_mask.defined() || has_zoneout_h();
    b.projected = one_step(sizes_.projected && changes_output, P, sum_type);
    b.running_h = one_step(has_zoneout_h(), P, sum_type);
    b.norm_workspace = one_step(layer.normalised(), 2 * H, sum_type);
    if (persistent_) return b;  // the mailboxes carry h
    if (one_product()) {
      b.recurrent_h[0] = b.recurrent_h[1] = both_h_.select(0, d);
    } else if (options_.recurrent_mask.defined() || (fused_ && !has_aligned_rows(b.output))) {
      b.recurrent_h[0] = one_step(true, fused_ ? aligned_length(P, c10::elementSize(dtype_)) : P, dtype_);
      b.recurrent_h[1] = fused_ ? at::empty_like(b.recurrent_h[0]) : b.recurrent_h[0];
    }
    return b;
  }

  template <typename T>
  cuda::NewOutput<T> new_output(const Direction& layer, const Buffers& b, const Step& step, int64_t n) const {
    using A = typename cuda::Types<T>::Accumulate;
    cuda::NewOutput<T> output{};
    output.h = row_pointer<T>(b.output, step.offset);
    output.h_stride = b.output.stride(0);
    output.h_n = row_pointer<T>(b.h_n);
    output.running_h = row_pointer<A>(b.running_h);
    output.zoneout = zoneout_h<A>(layer, step);
    output.h0 = row_pointer<const T>(layer.h0);
    output.reset_h = row_pointer<const T>(layer.reset_h);
    output.recurrent_mask = row_pointer<const A>(layer.recurrent_mask);
    const at::Tensor& recurrent_h = b.recurrent_h[n % 2];
    output.recurrent_h = row_pointer<T>(recurrent_h);
    output.recurrent_stride = recurrent_h.defined() ? recurrent_h.stride(0) : 0;
    return output;
  }

  // A direction while its steps run. It must not be moved: `steps` refers to `layer`.
  struct Running {
    Running(const StepwiseForward& pass, int64_t d)
        : layer(pass.direction(d)),
          steps(layer.steps()),
          buffers(pass.buffers(layer, d)),
          weight(pass.fused_ || pass.persistent_ ? with_aligned_rows(layer.weight_hh) : at::Tensor()),
          from_output(pass.rows_gemm_if(
              buffers.recurrent.defined(), buffers.recurrent, copies_h() ? buffers.recurrent_h[0] : buffers.output,
              (pass.one_product() ? pass.both_weight_hh_.select(0, d) : layer.weight_hh).t())),
          projection(pass.rows_gemm_if(pass.sizes_.projected,
                                       buffers.projected.defined() ? buffers.projected : buffers.output, buffers.hidden,
                                       transposed(layer.weight_hr))) {}
    bool copies_h() const { return buffers.recurrent_h[0].defined(); }
    const Chunk& running() const { return *chunk; }
    // The row of the chunk's mail with which the next chunk begins: that of the last step.
    int64_t row_left() const { return steps.rows_before(steps.time(chunk->end - 1)) - steps.rows_before(chunk->begin); }

    const Direction layer;
    const Steps steps;
    const Buffers buffers;
    const at::Tensor weight;  // U in the layout of the fused and persistent kernels
    const std::optional<RowsGemm> from_output, projection;
    std::optional<Chunk> chunk;  // chunk of the running step, and its W x
    InputPart input{};
    const void* left = nullptr;  // persistent: the h that the last step of the previous chunk left
  };

  // Both directions share their launches.
  template <typename T>
  void run_steps() {
    using A = typename cuda::Types<T>::Accumulate;
    std::list<Running> sides;
    std::vector<Steps> directions;
    for (int64_t d = 0; d < sizes_.directions; ++d) directions.push_back(sides.emplace_back(*this, d).steps);
    // Half of a small second-level cache, because U needs room too.
    const int64_t bytes = std::min(device_.chunk_bytes, std::max(device_.facts->l2_bytes / 2, int64_t{1} << 20));
    const int64_t limit = chunk_rows(bytes, 4 * sizes_.hidden_size * static_cast<int64_t>(sizeof(A)));
    std::optional<PersistentLaunches> launches;
    if (persistent_) launches.emplace(*persistent_, device_, input_.options());
    for (int64_t n = 0; n < sizes_.steps; ++n) {
      if (!whole_ && (n == 0 || n == sides.front().chunk->end)) {
        const std::vector<Chunk> chunks = chunk_at(directions, n, limit);
        auto chunk = chunks.begin();
        for (Running& side : sides) {
          side.chunk = *chunk++;
          side.input = {};  // first, so that its memory can be taken again
          side.input = input_part(side.layer, side.steps, *side.chunk);
        }
        if constexpr (kHasStep<T>) {
          if (persistent_) run_chunk<T>(sides, *launches);
        }
      }
      if (persistent_) continue;
      run_step<T>(sides, n);
      if (sizes_.projected) project<T>(sides, n);
    }
  }

  // Runs all steps of the chunk in one launch.
  template <typename T>
  void run_chunk(std::list<Running>& sides, PersistentLaunches& launches) const {
    launches.run<T>(&cuda::persistent_forward<T>, "persistent_forward", sides, 1, sizes_.hidden_size,
                    [&](const Running& side, int64_t) { return persistent_args<T>(side); });
  }

  template <typename T>
  cuda::PersistentForward<T> persistent_args(const Running& side) const {
    using A = typename cuda::Types<T>::Accumulate;
    cuda::PersistentForward<T> args{};
    const int64_t first = side.steps.rows_before(side.chunk->begin);
    args.cell = cell_of<T>(side, side.steps.time(side.chunk->begin));
    args.cell.input_part = row_pointer<const A>(side.input.rows);
    args.cell.c_previous.previous = args.cell.c =
        row_pointer<A>(side.buffers.cells, saved_.cells.defined() ? first : 0);
    args.steps = chunk_of_steps(side.steps, *side.chunk, side.layer.shape.reverse, sizes_.batch);
    if (options_.resets.defined()) args.resets = side.layer.shape.resets + first;
    args.keeps_cells = saved_.cells.defined();
    args.batch_first = side.input.batch_first;
    args.weight = row_pointer<const T>(side.weight);
    args.weight_stride = side.weight.stride(0);
    return args;
  }

  template <typename T>
  void run_step(const std::list<Running>& sides, int64_t n) const {
    FusedSteps<T> fused;
    cuda::StepSides<Gemm> multiplied{};
    cuda::StepSides<cuda::CellForward<T>> cells{};
    cuda::StepSides<cuda::NormCellForward<T>> norm_cells{};
    for (const Running& side : sides) {
      const auto& [layer, steps, b] = std::tie(side.layer, side.steps, side.buffers);
      const Step step = step_at(steps, n);
      const bool multiplies = step.previous_rows > 0;
      const int64_t before = side.copies_h() ? 0 : previous_offset(steps, n);
      const cuda::CellForward<T> cell = cell_of<T>(side, n);
      if (whole_) {
        fused.add_whole(cell, layer, side.weight, masked_state(layer.h0, layer), masked_state(layer.reset_h, layer));
        continue;
      }
      if (multiplies && fused_) {
        fused.add(cell, side.weight, side.copies_h() ? b.recurrent_h[(n - 1) % 2] : b.output, before,
                  step.previous_rows);
        continue;
      }
      if (multiplies) multiplied.add((*side.from_output)(0, before, step.previous_rows));
      if (layer.normalised()) {
        norm_cells.add(norm_cell_of<T>(cell, layer, b, step));
      } else {
        cells.add(cell);
      }
    }
    products(multiplied);
    if (cells.count > 0) check(cuda::cell_forward(cells, device_.stream), "cell_forward");
    if (norm_cells.count > 0) check(cuda::norm_cell_forward(norm_cells, device_.stream), "norm_cell_forward");
    if constexpr (kHasStep<T>) {
      // The kernel before a single step may be any of the caller's, even one that writes the weights, so a single step
      // is not launched as a dependent. With more steps the first one is not dependent either, and runs after the
      // weights are written.
      const bool dependent = dependent_ && !whole_;
      if (fused.sides.count > 0) check(cuda::step_forward(fused.sides, dependent, device_.stream), "step_forward");
    }
  }

  // The row of the buffer `hidden` at which a step begins.
  int64_t hidden_row(const Step& step) const { return saved_.hidden.defined() ? step.offset : 0; }

  template <typename T>
  cuda::CellForward<T> cell_of(const Running& side, int64_t n) const {
    using A = typename cuda::Types<T>::Accumulate;
    const auto& [layer, steps, b] = std::tie(side.layer, side.steps, side.buffers);
    const Step step = step_at(steps, n);
    const int64_t before = previous_offset(steps, n), H = sizes_.hidden_size;
    const bool save = saved_.cells.defined();
    cuda::CellForward<T> args{};
    args.rows = step_rows(layer, n);
    args.hidden_size = H;
    if (!whole_)
      args.input_part = row_pointer<const A>(side.input.rows, side.input.first_row(steps, *side.chunk, step));
    args.input_stride = side.input.stride * 4 * H;
    args.recurrent_part = row_pointer<const A>(b.recurrent);
    args.begin_part = row_pointer<const A>(b.begin_part);
    args.reset_part = row_pointer<const A>(b.reset_part);
    args.bias_ih = row_pointer<const T>(layer.bias_ih);
    args.bias_hh = row_pointer<const T>(layer.bias_hh);
    args.c_previous = {row_pointer<const A>(b.cells, save ? before : 0), row_pointer<const T>(layer.c0),
                       row_pointer<const T>(layer.reset_c)};
    args.zoneout = zoneout_c<A>(layer, step);
    args.options = cell_options<A>(layer.shape.reverse);
    args.c = row_pointer<A>(b.cells, save ? step.offset : 0);
    args.c_n = row_pointer<T>(b.c_n);
    args.preactivations = row_pointer<T>(b.preactivations, step.offset);
    if (sizes_.projected) {
      args.output.h = row_pointer<T>(b.hidden, hidden_row(step));
      args.output.h_stride = H;
    } else {
      args.output = new_output<T>(layer, b, step, n);
    }
    return args;
  }

  template <typename T>
  cuda::NormCellForward<T> norm_cell_of(const cuda::CellForward<T>& cell, const Direction& layer, const Buffers& b,
                                        const Step& step) const {
    using A = typename cuda::Types<T>::Accumulate;
    cuda::NormCellForward<T> args{};
    args.cell = cell;
    args.norm = layer_norm<A>(layer, options_);
    args.norm_input = row_pointer<T>(b.norm_input, step.offset);
    args.norm_recurrent = row_pointer<T>(b.norm_recurrent, step.offset);
    args.norm_factors = row_pointer<A>(b.norm_factors, step.offset);
    args.workspace = row_pointer<A>(b.norm_workspace);
    return args;
  }

  template <typename T>
  void project(const std::list<Running>& sides, int64_t n) const {
    using A = typename cuda::Types<T>::Accumulate;
    cuda::StepSides<cuda::OutputForward<T>> outputs{};
    for (const Running& side : sides) {
      const auto& [layer, steps, b] = std::tie(side.layer, side.steps, side.buffers);
      const Step step = step_at(steps, n);
      if (b.projected.defined()) {
        product((*side.projection)(0, hidden_row(step), step.rows));
        outputs.add({step_rows(layer, n), sizes_.output_size, row_pointer<const A>(b.projected),
                     new_output<T>(layer, b, step, n)});
        continue;
      }
      product((*side.projection)(step.offset, hidden_row(step), step.rows));
      const int64_t ending = step.rows - step.next_rows;
      if (ending > 0) {
        b.h_n.narrow(0, step.next_rows, ending).copy_(b.output.narrow(0, step.offset + step.next_rows, ending));
      }
    }
    if (outputs.count > 0) check(cuda::output_forward(outputs, device_.stream), "output_forward");
  }

  const at::Tensor output_, h_n_, c_n_;
  const Saved saved_;  // all undefined in inference
  const bool whole_;   // a single step is one kernel, W x included
  // Buffers::recurrent and recurrent_h of both directions, if one product reads them.
  const at::Tensor both_recurrent_, both_h_;
};

}  // namespace

LayerResults stepwise_forward(const LayerCall& call, const LayerSizes& sizes, bool save, const StepwiseDevice& device) {
  return without_refused(
      device, [&](const StepwiseDevice& chosen) { return StepwiseForward(call, sizes, save, chosen).run(); });
}

}  // namespace lstm_ext
