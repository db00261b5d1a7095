#include "torch/cpu_lengths.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "torch/tensors.h"

namespace lstm_ext {
namespace {

// The rows of padded data that count, in the order of a PackedSequence: the sequences by falling length, without those
// that have no step.
class Packing {
 public:
  Packing(const at::Tensor& lengths, int64_t time) : time_(time), batch_(lengths.size(0)) {
    auto [falling, order] = at::sort(materialized(lengths).clamp(0, time), /*dim=*/0, /*descending=*/true);
    const int64_t* length = falling.const_data_ptr<int64_t>();
    const int64_t* sequence = order.const_data_ptr<int64_t>();
    const int64_t sequences = std::count_if(length, length + batch_, [](int64_t n) { return n > 0; });
    sequences_ = order.narrow(0, 0, sequences);
    full_ = std::all_of(length, length + batch_, [&](int64_t n) { return n == time; });
    offsets_.push_back(0);
    for (int64_t t = 0, rows = sequences; rows > 0; ++t) {
      while (rows > 0 && length[rows - 1] <= t) --rows;
      if (rows > 0) offsets_.push_back(offsets_.back() + rows);
    }
    time_first_ = at::empty({offsets_.back()}, order.options());
    batch_first_ = at::empty({offsets_.back()}, order.options());
    int64_t* by_time = time_first_.mutable_data_ptr<int64_t>();
    int64_t* by_batch = batch_first_.mutable_data_ptr<int64_t>();
    for (int64_t t = 0; t < steps(); ++t) {
      for (int64_t row = 0; row < offsets_[t + 1] - offsets_[t]; ++row) {
        *by_time++ = t * batch_ + sequence[row];
        *by_batch++ = sequence[row] * time_ + t;
      }
    }
  }

  bool is_full() const { return full_; }
  int64_t steps() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t sequences() const { return sequences_.size(0); }
  const std::vector<int64_t>& offsets() const { return offsets_; }

  // The rows (..., N, ...) of (..., T, B, ...), where T is axis `dim`. Batch-first data is read in place. An undefined
  // tensor stays undefined, here and below.
  at::Tensor packed(const at::Tensor& tensor, int64_t dim) const {
    if (!tensor.defined()) return {};
    const at::Tensor x = materialized(tensor);
    if (x.stride(dim) < x.stride(dim + 1)) {
      return x.transpose(dim, dim + 1).flatten(dim, dim + 1).index_select(dim, batch_first_);
    }
    return x.flatten(dim, dim + 1).index_select(dim, time_first_);
  }
  // The reverse of it: rows that do not count become 0.
  at::Tensor padded(const at::Tensor& rows, int64_t dim) const {
    if (!rows.defined()) return {};
    std::vector<int64_t> sizes = rows.sizes().vec();
    sizes[dim] = time_ * batch_;
    return at::zeros(sizes, rows.options()).index_copy_(dim, time_first_, rows).unflatten(dim, {time_, batch_});
  }

  // The states (D, ..., n) of the packed sequences, in their order, from (D, B, n).
  at::Tensor packed_state(const at::Tensor& t) const {
    return t.defined() ? materialized(t).index_select(1, sequences_) : t;
  }
  // The reverse of it, in the type of `rows`: a sequence without a step gets its row of `rest`, or 0.
  at::Tensor padded_state(const at::Tensor& rows, const at::Tensor& rest = {}) const {
    if (!rows.defined()) return {};
    const at::Tensor all = rest.defined()
                               ? in_type(materialized(rest), rows.scalar_type()).clone(at::MemoryFormat::Contiguous)
                               : at::zeros({rows.size(0), batch_, rows.size(2)}, rows.options());
    return all.index_copy_(1, sequences_, rows);
  }

 private:
  int64_t time_, batch_;
  bool full_;
  std::vector<int64_t> offsets_;
  at::Tensor sequences_;                 // sorted in the order of their rows
  at::Tensor time_first_, batch_first_;  // the place of each row in (T, B) and in (B, T)
};

// The call that the kernels get: packed, without lengths.
LayerCall packed_call(const LayerCall& call, const Packing& packing) {
  LayerCall packed = call;
  packed.options.lengths = at::Tensor();
  if (packing.is_full()) return packed;
  packed.input = packing.packed(call.input, 0);
  for (at::Tensor* state :
       {&packed.h0, &packed.c0, &packed.options.reset_h, &packed.options.reset_c, &packed.options.recurrent_mask}) {
    *state = packing.packed_state(*state);
  }
  packed.options.resets = packing.packed(call.options.resets, 0);
  packed.options.keep_h = packing.packed(call.options.keep_h, 1);
  packed.options.keep_c = packing.packed(call.options.keep_c, 1);
  return packed;
}

LayerSizes packed_sizes(const LayerSizes& sizes, const Packing& packing) {
  LayerSizes packed = sizes;
  if (packing.is_full()) return packed;
  packed.steps = packing.steps();
  packed.batch = packing.sequences();
  packed.step_offsets = packing.offsets();
  return packed;
}

// The results of a forward pass in which no sequence has a step.
LayerResults results_of_no_steps(const LayerCall& call, const LayerSizes& sizes, bool save) {
  const auto options = call.input.options();
  const auto state = [&](const at::Tensor& initial, int64_t features) {
    return initial.defined() ? materialized(initial).clone(at::MemoryFormat::Contiguous)
                             : at::zeros({sizes.directions, sizes.batch, features}, options);
  };
  return {at::zeros(sizes.sequence_sizes(sizes.directions * sizes.output_size), options),
          state(call.h0, sizes.output_size), state(call.c0, sizes.hidden_size),
          save ? sizes.empty_saved(call, options, &allocate_zeros) : Saved{}};
}

LayerGradients gradients_of_no_steps(const LayerCall& call, const BackwardArguments& arguments) {
  LayerGradients grads = make_gradients(call, arguments.needs_grad, [](const at::Tensor& input, size_t) {
    return at::zeros(input.sizes(), input.options());
  });
  // The final states are the initial ones.
  if (grads.h0.defined() && arguments.grads.h_n.defined()) grads.h0.copy_(arguments.grads.h_n);
  if (grads.c0.defined() && arguments.grads.c_n.defined()) grads.c0.copy_(arguments.grads.c_n);
  return grads;
}

}  // namespace

LayerResults forward_with_lengths(const LayerCall& call, const LayerSizes& sizes, bool save) {
  const Packing packing(call.options.lengths, sizes.steps);
  if (!packing.is_full() && packing.sequences() == 0) return results_of_no_steps(call, sizes, save);
  LayerResults results = cpu_backend().forward(packed_call(call, packing), packed_sizes(sizes, packing), save);
  if (packing.is_full()) return results;
  Saved::visit(results.saved, [&](at::Tensor& tensor) { tensor = packing.padded(tensor, 1); });
  results.output = packing.padded(results.output, 0);
  results.h_n = packing.padded_state(results.h_n, call.h0);
  results.c_n = packing.padded_state(results.c_n, call.c0);
  return results;
}

LayerGradients backward_with_lengths(const LayerCall& call, const LayerSizes& sizes,
                                     const BackwardArguments& arguments) {
  const Packing packing(call.options.lengths, sizes.steps);
  if (!packing.is_full() && packing.sequences() == 0) return gradients_of_no_steps(call, arguments);
  const LayerCall inner = packed_call(call, packing);
  const LayerSizes inner_sizes = packed_sizes(sizes, packing);
  if (packing.is_full()) return cpu_backend().backward(inner, inner_sizes, arguments);

  const ResultGradients& given = arguments.grads;
  ResultGradients result_grads;
  result_grads.output = packing.packed(given.output, 0);
  result_grads.h_n = packing.packed_state(given.h_n);
  result_grads.c_n = packing.packed_state(given.c_n);
  result_grads.cells = packing.packed(given.cells, 1);
  result_grads.gate_values = packing.packed(given.gate_values, 1);
  Saved saved = arguments.saved;
  Saved::visit(saved, [&](at::Tensor& tensor) { tensor = packing.packed(tensor, 1); });
  LayerGradients grads = cpu_backend().backward(
      inner, inner_sizes, {result_grads, packing.packed(arguments.output, 0), saved, arguments.needs_grad});
  if (grads.input.defined()) grads.input = packing.padded(in_type(grads.input, call.input.scalar_type()), 0);
  // The final state of a sequence without a step is its initial one.
  grads.h0 = packing.padded_state(grads.h0, given.h_n);
  grads.c0 = packing.padded_state(grads.c0, given.c_n);
  for (at::Tensor* grad : {&grads.options.reset_h, &grads.options.reset_c}) *grad = packing.padded_state(*grad);
  return grads;
}

}  // namespace lstm_ext
