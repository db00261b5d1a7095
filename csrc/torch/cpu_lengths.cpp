#include "torch/cpu_lengths.h"

#include <ATen/ATen.h>

#include <algorithm>

#include "torch/tensors.h"

namespace lstm_ext {
namespace {

OptionalTensor present(const OptionalTensor& t) { return t && t->defined() ? t : std::nullopt; }

// Which rows of padded data count, in the order of a PackedSequence: the sequences by falling length, those without a
// step left out.
class Packing {
 public:
  Packing(const at::Tensor& lengths, int64_t time) : time_(time), batch_(lengths.size(0)) {
    auto [falling, order] = at::sort(materialized(lengths).clamp(0, time), /*dim=*/0, /*descending=*/true);
    const int64_t* length = falling.const_data_ptr<int64_t>();
    const int64_t* sequence = order.const_data_ptr<int64_t>();
    const int64_t kept = std::count_if(length, length + batch_, [](int64_t n) { return n > 0; });
    sequences_ = order.narrow(0, 0, kept);
    full_ = std::all_of(length, length + batch_, [&](int64_t n) { return n == time; });
    offsets_.push_back(0);
    for (int64_t t = 0, rows = kept; rows > 0; ++t) {
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

  // The rows (..., N, ...) of (..., T, B, ...), where T is axis `dim`. Batch-first data is read where it lies.
  at::Tensor packed(const at::Tensor& tensor, int64_t dim) const {
    const at::Tensor x = materialized(tensor);
    if (x.stride(dim) < x.stride(dim + 1)) {
      return x.transpose(dim, dim + 1).flatten(dim, dim + 1).index_select(dim, batch_first_);
    }
    return x.flatten(dim, dim + 1).index_select(dim, time_first_);
  }
  OptionalTensor packed(const OptionalTensor& t, int64_t dim) const {
    return present(t) ? OptionalTensor(packed(*t, dim)) : std::nullopt;
  }
  // The reverse of it: 0 where a row does not count.
  at::Tensor padded(const at::Tensor& rows, int64_t dim) const {
    std::vector<int64_t> sizes = rows.sizes().vec();
    sizes[dim] = time_ * batch_;
    return at::zeros(sizes, rows.options()).index_copy_(dim, time_first_, rows).unflatten(dim, {time_, batch_});
  }

  // The states (D, ..., n) of the sequences that are packed, in their order, of (D, B, n).
  OptionalTensor packed_state(const OptionalTensor& t) const {
    return present(t) ? OptionalTensor(materialized(*t).index_select(1, sequences_)) : std::nullopt;
  }
  // The reverse of it: the rows of sequences without a step are those of `rest`, or 0.
  at::Tensor padded_state(const at::Tensor& rows, const OptionalTensor& rest) const {
    const at::Tensor all = present(rest) ? materialized(*rest).clone(at::MemoryFormat::Contiguous)
                                         : at::zeros({rows.size(0), batch_, rows.size(2)}, rows.options());
    return all.index_copy_(1, sequences_, rows);
  }

 private:
  int64_t time_, batch_;
  bool full_;
  std::vector<int64_t> offsets_;
  at::Tensor sequences_;                 // in the order of their rows
  at::Tensor time_first_, batch_first_;  // of each row, its place in (T, B) and in (B, T)
};

// The arguments of the layer that the kernels see.
struct PackedLayer {
  PackedLayer(const LayerArguments& layer, const LayerSizes& s, const Packing& packing)
      : sizes(s), weights(layer.weights), has_bias(layer.has_bias), extras(layer.extras) {
    extras.lengths.reset();
    if (packing.is_full()) {
      input = layer.input;
      h0 = layer.h0;
      c0 = layer.c0;
      return;
    }
    sizes.steps = packing.steps();
    sizes.batch = packing.sequences();
    sizes.step_offsets = packing.offsets();
    input = packing.packed(layer.input, 0);
    h0 = packing.packed_state(layer.h0);
    c0 = packing.packed_state(layer.c0);
    extras.resets = packing.packed(extras.resets, 0);
    extras.reset_h = packing.packed_state(extras.reset_h);
    extras.reset_c = packing.packed_state(extras.reset_c);
    extras.recurrent_mask = packing.packed_state(extras.recurrent_mask);
    extras.kept_h = packing.packed(extras.kept_h, 1);
    extras.kept_c = packing.packed(extras.kept_c, 1);
  }
  LayerArguments arguments() const { return {input, h0, c0, weights, has_bias, extras}; }

  LayerSizes sizes;
  at::Tensor input;
  OptionalTensor h0, c0;
  const std::vector<at::Tensor>& weights;
  bool has_bias;
  Extras extras;
};

// What a forward pass of sequences without a step gives.
ForwardResult result_of_nothing(const LayerArguments& layer, const LayerSizes& s, bool save) {
  const auto options = layer.input.options();
  const auto state = [&](const OptionalTensor& initial, int64_t features) {
    return present(initial) ? materialized(*initial).clone(at::MemoryFormat::Contiguous)
                            : at::zeros({s.directions, s.batch, features}, options);
  };
  std::vector<at::Tensor> saved;
  if (save) {
    const auto zeros = [&](at::IntArrayRef sizes) { saved.push_back(at::zeros(sizes, options.dtype(s.sum_type))); };
    if (!layer.extras.recompute) zeros(s.saved_sizes(4 * s.hidden_size));
    zeros(s.saved_sizes(s.hidden_size));
    if (s.projected && !layer.extras.recompute) zeros(s.saved_sizes(s.hidden_size));
    if (!layer.extras.norm.empty()) {
      zeros(s.saved_product_sizes());
      zeros(s.saved_sizes(2));
    }
  }
  return {at::zeros(s.sequence_sizes(s.directions * s.output_size), options), state(layer.h0, s.output_size),
          state(layer.c0, s.hidden_size), saved};
}

// The gradients of a layer's arguments, in the order of lstm_layer_backward, where no sequence has a step.
std::vector<at::Tensor> gradients_of_nothing(const LayerArguments& layer, const BackwardArguments& arguments) {
  std::vector<OptionalTensor> inputs{layer.input, layer.h0, layer.c0};
  inputs.insert(inputs.end(), layer.weights.begin(), layer.weights.end());
  inputs.insert(inputs.end(), {layer.extras.reset_h, layer.extras.reset_c});
  inputs.insert(inputs.end(), layer.extras.norm.begin(), layer.extras.norm.end());
  std::vector<at::Tensor> grads(arguments.wanted.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    if (arguments.wanted[i] && present(inputs[i])) grads[i] = at::zeros(inputs[i]->sizes(), inputs[i]->options());
  }
  // The final states are the initial ones.
  if (grads[1].defined() && present(arguments.grad_h_n)) grads[1].copy_(*arguments.grad_h_n);
  if (grads[2].defined() && present(arguments.grad_c_n)) grads[2].copy_(*arguments.grad_c_n);
  return grads;
}

}  // namespace

ForwardResult forward_with_lengths(const LayerArguments& layer, const LayerSizes& s, bool save) {
  const Packing packing(*layer.extras.lengths, s.steps);
  if (!packing.is_full() && packing.sequences() == 0) return result_of_nothing(layer, s, save);
  const PackedLayer packed(layer, s, packing);
  auto [output, h_n, c_n, saved] = cpu_backend().forward(packed.arguments(), packed.sizes, save);
  if (packing.is_full()) return {output, h_n, c_n, saved};
  for (at::Tensor& t : saved) t = packing.padded(t, 1);
  return {packing.padded(output, 0), packing.padded_state(h_n, layer.h0), packing.padded_state(c_n, layer.c0), saved};
}

std::vector<at::Tensor> backward_with_lengths(const LayerArguments& layer, const LayerSizes& s,
                                              const BackwardArguments& g) {
  const Packing packing(*layer.extras.lengths, s.steps);
  if (!packing.is_full() && packing.sequences() == 0) return gradients_of_nothing(layer, g);
  const PackedLayer packed(layer, s, packing);
  if (packing.is_full()) return cpu_backend().backward(packed.arguments(), packed.sizes, g);

  const OptionalTensor grad_output = packing.packed(g.grad_output, 0), grad_h_n = packing.packed_state(g.grad_h_n),
                       grad_c_n = packing.packed_state(g.grad_c_n), grad_gates = packing.packed(g.grad_gates, 1),
                       grad_cells = packing.packed(g.grad_cells, 1);
  std::vector<at::Tensor> saved;
  for (const at::Tensor& t : g.saved) saved.push_back(packing.packed(t, 1));
  std::vector<at::Tensor> grads = cpu_backend().backward(
      packed.arguments(), packed.sizes,
      {grad_output, grad_h_n, grad_c_n, grad_gates, grad_cells, packing.packed(g.output, 0), saved, g.wanted});
  if (grads[0].defined()) grads[0] = packing.padded(grads[0], 0);
  // The final state of a sequence without a step is its initial one.
  if (grads[1].defined()) grads[1] = packing.padded_state(grads[1], g.grad_h_n);
  if (grads[2].defined()) grads[2] = packing.padded_state(grads[2], g.grad_c_n);
  const size_t first = 3 + layer.weights.size();
  for (size_t i = first; i < std::min(first + 2, grads.size()); ++i) {  // reset_h and reset_c
    if (grads[i].defined()) grads[i] = packing.padded_state(grads[i], std::nullopt);
  }
  return grads;
}

}  // namespace lstm_ext
