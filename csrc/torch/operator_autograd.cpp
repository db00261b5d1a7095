#include "torch/operator_autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "torch/autograd_tracking.h"

// GCC 12 takes Function::apply's std::vector<bool>::reserve, of a vector that is empty then, for an overflow.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Warray-bounds"
#pragma GCC diagnostic ignored "-Wstringop-overflow"
#endif

namespace lstm_ext::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}
const auto& layer_op() {
  static const auto op = find<LayerOp>("lstm_ext::lstm_layer");
  return op;
}
const auto& layer_forward_op() {
  static const auto op = find<LayerForwardOp>("lstm_ext::lstm_layer_forward");
  return op;
}
const auto& layer_backward_op() {
  static const auto op = find<LayerBackwardOp>("lstm_ext::lstm_layer_backward");
  return op;
}

void append(variable_list& list, const OptionalTensor& t) {
  if (t) list.push_back(*t);
}

class LSTMLayer : public torch::autograd::Function<LSTMLayer> {
 public:
  // The backward pass is made of calls through the dispatcher: compiled autograd may trace it.
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const Tensor& input, const OptionalTensor& h0,
                               const OptionalTensor& c0, const at::TensorList& weights,
                               const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, h_n, c_n, gates, cells, hidden] =
        layer_forward_op().call(input, h0, c0, weights, batch_sizes, has_bias, bidirectional);
    variable_list saved{input};
    append(saved, h0);
    append(saved, c0);
    saved.insert(saved.end(), weights.begin(), weights.end());
    append(saved, batch_sizes);
    for (const Tensor& t : {output, gates, cells, hidden}) saved.push_back(t);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["has_h0"] = h0.has_value();
    ctx->saved_data["has_c0"] = c0.has_value();
    ctx->saved_data["has_batch_sizes"] = batch_sizes.has_value();
    ctx->saved_data["has_bias"] = has_bias;
    ctx->saved_data["bidirectional"] = bidirectional;
    return {output, h_n, c_n};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto flag = [&](const char* name) { return ctx->saved_data[name].toBool(); };
    const variable_list saved = ctx->get_saved_variables();
    size_t next = 0;
    const auto take_if = [&](bool there) { return there ? OptionalTensor(saved[next++]) : std::nullopt; };
    const Tensor input = saved[next++];
    const OptionalTensor h0 = take_if(flag("has_h0"));
    const OptionalTensor c0 = take_if(flag("has_c0"));
    const size_t weight_count = saved.size() - next - (flag("has_batch_sizes") ? 1 : 0) - 4;
    const at::TensorList weights = at::TensorList(saved).slice(next, weight_count);
    next += weight_count;
    const OptionalTensor batch_sizes = take_if(flag("has_batch_sizes"));
    const at::TensorList kept = at::TensorList(saved).slice(next, 4);  // output, gates, cells, hidden

    // Edges of the graph lead to the tensors that were there, and to no others.
    size_t edge = 0;
    bool any_wanted = false;
    c10::List<bool> wanted;
    const auto want_if = [&](bool there) {
      const bool want = there && ctx->needs_input_grad(edge++);
      wanted.push_back(want);
      any_wanted |= want;
    };
    want_if(true);
    want_if(h0.has_value());
    want_if(c0.has_value());
    for (size_t i = 0; i < weight_count; ++i) want_if(true);

    // One for every argument of forward: batch_sizes and the two flags have none.
    variable_list result(3 + weight_count + 3);
    const auto given = [](const Tensor& grad) { return grad.defined() ? OptionalTensor(grad) : std::nullopt; };
    const OptionalTensor grad_output = given(grads[0]), grad_h_n = given(grads[1]), grad_c_n = given(grads[2]);
    if (!any_wanted || !(grad_output || grad_h_n || grad_c_n)) return result;
    const std::vector<Tensor> computed =
        layer_backward_op().call(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, kept[0], kept[1],
                                 kept[2], kept[3], flag("has_bias"), flag("bidirectional"), wanted);
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i]) result[i] = computed[i];
    }
    return result;
  }
};

// The forward and backward kernels, which are the two ends of LSTMLayer: asked for a gradient, they say so.
class LSTMLayerForward : public torch::autograd::Function<LSTMLayerForward> {
 public:
  static variable_list forward(AutogradContext*, const Tensor& input, const OptionalTensor& h0,
                               const OptionalTensor& c0, const at::TensorList& weights,
                               const OptionalTensor& batch_sizes, bool has_bias, bool bidirectional) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [output, h_n, c_n, gates, cells, hidden] =
        layer_forward_op().call(input, h0, c0, weights, batch_sizes, has_bias, bidirectional);
    return {output, h_n, c_n, gates, cells, hidden};
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "lstm_ext::lstm_layer_forward", kNoGradient);
  }
};

class LSTMLayerBackward : public torch::autograd::Function<LSTMLayerBackward> {
 public:
  static variable_list forward(AutogradContext*, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                               const OptionalTensor& grad_c_n, const Tensor& input, const OptionalTensor& h0,
                               const OptionalTensor& c0, const at::TensorList& weights,
                               const OptionalTensor& batch_sizes, const Tensor& output, const Tensor& gates,
                               const Tensor& cells, const Tensor& hidden, bool has_bias, bool bidirectional,
                               const c10::List<bool>& wanted) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return layer_backward_op().call(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, output, gates,
                                    cells, hidden, has_bias, bidirectional, wanted);
  }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "lstm_ext::lstm_layer_backward", kNoGradient);
  }
};

}  // namespace

LayerResult lstm_layer_autograd(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                at::TensorList weights, const OptionalTensor& batch_sizes, bool has_bias,
                                bool bidirectional) {
  if (any_tracked(input, h0, c0, weights)) {
    const variable_list r = LSTMLayer::apply(input, h0, c0, weights, batch_sizes, has_bias, bidirectional);
    return {r[0], r[1], r[2]};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return layer_op().call(input, h0, c0, weights, batch_sizes, has_bias, bidirectional);
}

LayerResultAndSaved lstm_layer_forward_autograd(const Tensor& input, const OptionalTensor& h0, const OptionalTensor& c0,
                                                at::TensorList weights, const OptionalTensor& batch_sizes,
                                                bool has_bias, bool bidirectional) {
  if (any_tracked(input, h0, c0, weights)) {
    const variable_list r = LSTMLayerForward::apply(input, h0, c0, weights, batch_sizes, has_bias, bidirectional);
    return {r[0], r[1], r[2], r[3], r[4], r[5]};
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return layer_forward_op().call(input, h0, c0, weights, batch_sizes, has_bias, bidirectional);
}

std::vector<Tensor> lstm_layer_backward_autograd(const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                                                 const OptionalTensor& grad_c_n, const Tensor& input,
                                                 const OptionalTensor& h0, const OptionalTensor& c0,
                                                 at::TensorList weights, const OptionalTensor& batch_sizes,
                                                 const Tensor& output, const Tensor& gates, const Tensor& cells,
                                                 const Tensor& hidden, bool has_bias, bool bidirectional,
                                                 c10::List<bool> wanted) {
  if (any_tracked(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, output, gates, cells, hidden)) {
    return LSTMLayerBackward::apply(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, output, gates,
                                    cells, hidden, has_bias, bidirectional, wanted);
  }
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return layer_backward_op().call(grad_output, grad_h_n, grad_c_n, input, h0, c0, weights, batch_sizes, output, gates,
                                  cells, hidden, has_bias, bidirectional, wanted);
}

}  // namespace lstm_ext::ops
