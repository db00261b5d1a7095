// The sums of the backward pass over the steps of a chunk, one product for each, and the gradients that result.
#pragma once

#include <utility>

#include "torch/cuda_stepwise_common.h"

namespace lstm_ext {

class ChunkGradients : protected Stepwise {
 protected:
  ChunkGradients(const LayerCall& call, const LayerSizes& sizes, const BackwardArguments& args,
                 const StepwiseDevice& device)
      // float16 has no more digits than TF32, so TF32 products lose nothing of such an operand. The gradients of the
      // preactivations are float32 there, and keep the digits that float16 would lose.
      : Stepwise(call, sizes, &args, device, device.tf32 || call.input.scalar_type() == at::kHalf),
        output_(with_contiguous_rows(materialized(args.output))),
        saved_(args.saved),
        grads_(make_gradients(call_, args.needs_grad, [&](const at::Tensor& input, size_t number) {
          // Those of the states and the first one of the input are written, not added.
          if (number > 2) return at::zeros(input.sizes(), options(sizes.sum_type));
          // The sum of both directions is rounded once.
          return at::empty(input.sizes(), options(number == 0 && sizes.directions == 1 ? dtype_ : sizes.sum_type));
        })) {
    if (options_.lengths.defined()) {
      const at::Tensor times = at::arange(sizes.steps, options_.lengths.options()).unsqueeze(1);
      padding_ = times.ge(options_.lengths).view({-1, 1});
    }
  }

  // The factors and results of the products over a chunk, and the data that a step passes to the step before.
  struct Buffers {
    // (rows of a chunk, 4H): gradients of U h, and with layer normalisation of W x; otherwise both are the same.
    at::Tensor recurrent_part, input_part;
    at::Tensor preactivations, tanh_input, norm_cell;  // see cuda::NormCellBackward
    at::Tensor cell_terms;                             // see cuda::CellBackward
    at::Tensor output;                                 // (rows of a chunk, P), with a projection
    at::Tensor hidden;                                 // (rows of a chunk, H): o * tanh(c), if it was not saved
    at::Tensor recurrent;                              // (B, P): dL/dh_t through the step after t
    at::Tensor parts[2];                // fused: replaces `recurrent`, for two steps in turn: cuda::StepBackward
    at::Tensor grad_hidden;             // (B, H), with a projection: dL/d(o * tanh(c_t))
    at::Tensor grad_c, grad_h;          // (B, H); with zoneout (B, P): see cuda::GradOutput
    at::Tensor begin_part, reset_part;  // see cuda::CellBackward
  };

  at::Tensor operand(const at::Tensor& t) const { return in_type(t, gradient_type()); }

  // Adds the products over the steps of a chunk.
  template <typename T>
  void add_chunk(const Direction& layer, const Steps& steps, const Chunk& chunk, int64_t d, const Buffers& b,
                 const DirectionInputs& g) {
    const int64_t first = steps.rows_before(chunk.begin);
    const int64_t rows = steps.rows_before(chunk.finish) - first;
    const at::Tensor recurrent_part = b.recurrent_part.narrow(0, 0, rows);
    const at::Tensor input_part = layer.normalised() ? b.input_part.narrow(0, 0, rows) : recurrent_part;
    if (grads_.input.defined()) {
      const at::Tensor grad_input = grads_.input.view({total_rows(), -1}).narrow(0, first, rows);
      add_input_gradient(grad_input, input_part, operand(layer.weight_ih), sizes_.directions == 2);
    }
    if (g.weight_ih.defined()) {
      at::Tensor x = rows_between(layer.input, steps, chunk.begin, chunk.finish);
      // Padding may hold infinity, and 0 times infinity is not 0.
      if (padding_.defined()) x = x.masked_fill(padding_.narrow(0, first, rows), 0);
      product(g.weight_ih, input_part.t(), operand(x), true);
    }
    if (g.weight_hh.defined()) add_recurrent_gradient<T>(layer, steps, chunk, d, recurrent_part, g.weight_hh);
    if (layer.normalised()) {
      add_products<T>(g.bias(), b.preactivations, {}, rows);
      const auto norm_product = [&](int64_t n) {
        return rows_of_direction(saved_.norm_products, n).narrow(0, first, rows);
      };
      add_products<T>(g.gain_ih, b.preactivations, norm_product(d), rows);
      add_products<T>(g.gain_hh, b.preactivations, norm_product(sizes_.directions + d), rows);
      add_products<T>(g.gain_c, b.tanh_input, b.norm_cell, rows);
      add_products<T>(g.bias_c, b.tanh_input, {}, rows);
    } else if (g.bias().defined()) {
      using A = typename cuda::Types<T>::Accumulate;
      using D = typename cuda::Types<T>::Gradient;
      const int64_t columns = recurrent_part.size(1);
      const at::Tensor partial = partial_sums(rows, columns);
      const cuda::ColumnSums<T> sums{rows, columns, row_pointer<const D>(recurrent_part), row_pointer<A>(partial),
                                     row_pointer<A>(g.bias())};
      check(cuda::column_sums(sums, device_.stream), "column_sums");
    }
    if (b.cell_terms.defined()) {
      const int64_t H = sizes_.hidden_size;
      const at::Tensor sums = at::zeros({cell::kParameters * H}, options(sizes_.sum_type));
      add_products<T>(sums, b.cell_terms, {}, rows);
      for (int n = 0; n < cell::kParameters; ++n) {
        if (g.cell[n].defined()) g.cell[n].add_(sums.narrow(0, n * H, H));
      }
    }
    if (g.weight_hr.defined()) {
      const at::Tensor hidden =
          b.hidden.defined() ? b.hidden.narrow(0, 0, rows) : rows_of_direction(saved_.hidden, d).narrow(0, first, rows);
      product(g.weight_hr, b.output.narrow(0, 0, rows).t(), operand(hidden), true);
    }
  }

  at::Tensor partial_sums(int64_t rows, int64_t columns) const {
    return at::empty({cuda::column_sum_parts(rows), columns}, options(sizes_.sum_type));
  }

  template <typename T>
  void add_products(const at::Tensor& sum, const at::Tensor& values, const at::Tensor& factors, int64_t rows) const {
    using A = typename cuda::Types<T>::Accumulate;
    if (!sum.defined()) return;
    const at::Tensor partial = partial_sums(rows, values.size(1));
    const cuda::ProductSums<T> sums{rows,
                                    values.size(1),
                                    row_pointer<const A>(values),
                                    row_pointer<const T>(factors),
                                    row_pointer<A>(partial),
                                    row_pointer<A>(sum)};
    check(cuda::product_sums(sums, device_.stream), "product_sums");
  }

  void add_input_gradient(const at::Tensor& grad_input, const at::Tensor& input_part, const at::Tensor& weight_ih,
                          bool accumulate) const {
    if (gradient_type() == dtype_ || grad_input.scalar_type() == sizes_.sum_type) {
      product(grad_input, input_part, weight_ih, accumulate);
      return;
    }
    const at::Tensor sum = at::empty(grad_input.sizes(), options(gradient_type()));
    product(sum, input_part, weight_ih);
    grad_input.copy_(sum);
  }

  // Adds to dL/dU: a product of the gradients of U h of each step with h of the previous step.
  template <typename T>
  void add_recurrent_gradient(const Direction& layer, const Steps& steps, const Chunk& chunk, int64_t d,
                              const at::Tensor& recurrent_part, const at::Tensor& weight_hh) const {
    const int64_t P = sizes_.output_size;
    if (sizes_.packed() || options_.resets.defined() || options_.lengths.defined() ||
        options_.recurrent_mask.defined()) {
      product(weight_hh, recurrent_part.t(), previous_outputs<T>(layer, steps, chunk, d), true);
      return;
    }
    // In dense data, h of the previous steps is the same rows of the output, shifted by a step.
    const int64_t moved = d == 1 ? 1 : -1;
    const int64_t begin = d == 1 ? chunk.begin : std::max<int64_t>(chunk.begin, 1);
    const int64_t finish = d == 1 ? std::min(chunk.finish, sizes_.steps - 1) : chunk.finish;
    const auto part_between = [&](int64_t from, int64_t to) {
      return recurrent_part.narrow(0, (from - chunk.begin) * sizes_.batch, (to - from) * sizes_.batch);
    };
    if (begin < finish) {
      const at::Tensor h = output_.narrow(-1, d * P, P);
      product(weight_hh, part_between(begin, finish).t(),
              operand(rows_between(h, steps, begin + moved, finish + moved)), true);
    }
    if (chunk.first == 0 && layer.h0.defined()) {
      const int64_t time = steps.time(0);
      product(weight_hh, part_between(time, time + 1).t(), operand(layer.h0), true);
    }
  }

  // The h of the previous steps for a chunk (rows, P), in gradient_type(); see cuda::PreviousOutputs.
  template <typename T>
  at::Tensor previous_outputs(const Direction& layer, const Steps& steps, const Chunk& chunk, int64_t d) const {
    using A = typename cuda::Types<T>::Accumulate;
    using D = typename cuda::Types<T>::Gradient;
    const int64_t P = sizes_.output_size, first = steps.rows_before(chunk.begin);
    const at::Tensor h = rows_between(output_.narrow(-1, d * P, P), steps, 0, steps.count());
    const at::Tensor result = at::empty({steps.rows_before(chunk.finish) - first, P}, options(gradient_type()));
    for (int64_t n = chunk.first; n < chunk.end;) {
      cuda::PreviousOutputs<T> args{};
      args.output_size = P;
      args.previous_stride = h.stride(0);
      args.h0 = row_pointer<const T>(layer.h0);
      args.reset_h = row_pointer<const T>(layer.reset_h);
      args.lengths = row_pointer<const int64_t>(options_.lengths);
      args.recurrent_mask = row_pointer<const A>(layer.recurrent_mask);
      args.reverse = layer.shape.reverse;
      for (; n < chunk.end && args.count < args.kSteps; ++n) {
        const Step step = step_at(steps, n);
        args.steps[args.count++] = {step.rows,
                                    step.previous_rows,
                                    row_pointer<const T>(h, previous_offset(steps, n)),
                                    row_pointer<D>(result, step.offset - first),
                                    steps.resets_before(step.time),
                                    step.time};
      }
      check(cuda::previous_outputs(args, device_.stream), "previous_outputs");
    }
    return result;
  }

  // Recomputes the preactivations of a chunk (rows, 4H), by two products over all its steps.
  template <typename T>
  at::Tensor preactivations_of(const Direction& layer, const Steps& steps, const Chunk& chunk, int64_t d) const {
    const at::Tensor x = rows_between(layer.input, steps, chunk.begin, chunk.finish);
    const at::Tensor sum = at::empty({x.size(0), 4 * sizes_.hidden_size}, options(sizes_.sum_type));
    product(sum, x, layer.weight_ih.t());
    product(sum, in_type(previous_outputs<T>(layer, steps, chunk, d), dtype_), layer.weight_hh.t(), true);
    if (layer.bias_ih.defined()) sum.add_(layer.bias_ih.to(sizes_.sum_type).add(layer.bias_hh));
    return in_type(sum, dtype_);
  }

  const at::Tensor output_;
  const Saved saved_;
  LayerGradients grads_;

 private:
  at::Tensor padding_;  // (all rows, 1), with lengths: whether a row is padding
};

}  // namespace lstm_ext
