"""The options under compilers, exporters, transforms and autocast; what recompute keeps."""

from __future__ import annotations

import warnings

import internals
import pytest
import torch
from judge import torch_dtypes
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves, tree_map

import lstm_ext
from lstm_ext import functional, reference
from lstm_ext.native import loader

T, B, I, H = 4, 3, 3, 4
RESETS = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
LENGTHS = torch.tensor([3, 0, 4])
LAYERS = {
    "plain": {},
    "norm": {"layer_norm": True},
    "zoneout": {"zoneout": (0.2, 0.3)},
    "cell": {"peephole": True, "cell_clip": 0.2, "coupled_gates": True},
    "activations": {"gate_activation": "softsign", "cell_activation": "elu", "preactivation_clip": 0.5},
    "recompute": {"recompute": True, "layer_norm": True},
}
CALLS = {
    "nothing": {},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": torch.arange(T).unsqueeze(1) < LENGTHS},
    "resets": {"resets": RESETS, "return_cell_states": True, "return_gates": True},
}
CASES = [
    ("plain", "lengths"),
    ("plain", "mask"),
    ("plain", "resets"),
    ("norm", "nothing"),
    ("norm", "lengths"),
    ("zoneout", "resets"),
    ("cell", "resets"),
    ("cell", "lengths"),
    ("recompute", "resets"),
    ("recompute", "lengths"),
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def layer(name: str, **options) -> lstm_ext.LSTM:
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, **LAYERS[name], **options)
    for p in module.parameters():  # peepholes are 0 at first
        torch.nn.init.normal_(p, std=0.5)
    return module.eval()


def close(a, b):
    torch.testing.assert_close(tree_leaves(a), tree_leaves(b), rtol=1e-4, atol=1e-5)


def total(results) -> Tensor:
    return sum(t.sin().sum() for t in tree_leaves(results))


@pytest.mark.parametrize(("name", "call"), CASES)
def test_compile(name, call):
    torch._dynamo.reset()
    module, x = layer(name), torch.randn(T, B, I, requires_grad=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    ours, expected = compiled(x, **CALLS[call]), module(x, **CALLS[call])
    close(ours, expected)
    leaves = [x, *module.parameters()]
    close(torch.autograd.grad(total(ours), leaves), torch.autograd.grad(total(expected), leaves))


def test_numbers_of_the_module_compile_with_dynamic_sizes():
    """dynamo may take a float for a number that changes from call to call."""
    torch._dynamo.reset()
    module = lstm_ext.LSTM(I, H, zoneout=(0.2, 0.3)).eval()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        x = torch.randn(T, batch, I)
        close(compiled(x), module(x))
    module = lstm_ext.LSTM(I, H, recurrent_dropout=0.5, zoneout=0.2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    compiled(torch.randn(T, B, I))[0].sum().backward()


def test_random_masks_are_drawn_in_a_compiled_layer():
    torch._dynamo.reset()
    module = lstm_ext.LSTM(I, H, recurrent_dropout=0.5, zoneout=(0.3, 0.3))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, B, I)
    first, second = compiled(x)[0], compiled(x)[0]
    assert not torch.equal(first, second)
    # Those that an eager call draws.
    torch.manual_seed(1)
    expected = module(x)
    torch.manual_seed(1)
    close(compiled(x), expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("name", "call"), CASES)
def test_export(name, call, strict):
    module, x = layer(name), torch.randn(T, B, I)
    program = torch.export.export(module, (x,), CALLS[call], strict=strict)
    x = torch.randn(T, B, I)
    close(program.module()(x, **CALLS[call]), module(x, **CALLS[call]))


def test_packed_options_without_kernels_are_refused_by_compilers(monkeypatch):
    monkeypatch.setattr(loader, "has_kernels", lambda: False)
    packed = pack_sequence([torch.randn(n, I) for n in (4, 2)])
    module = lstm_ext.LSTM(I, H, layer_norm=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="do not support a PackedSequence together with options"):
        torch.compile(module, backend="eager", fullgraph=True)(packed)
    with pytest.raises(Exception, match="do not support a PackedSequence together with options"):
        torch.export.export(module, (packed,), strict=False)


def test_packed_recompute_in_a_compiled_layer():
    torch._dynamo.reset()
    data = pack_sequence([torch.randn(n, I) for n in (4, 2)], enforce_sorted=False)
    module = lstm_ext.LSTM(I, H, 2, recompute=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    ours, expected = compiled(data), module(data)
    close((ours[0].data, ours[1]), (expected[0].data, expected[1]))
    gradients = [
        torch.autograd.grad(y.data.sin().sum(), list(module.parameters())) for y in (ours[0], expected[0])
    ]
    close(*gradients)


# Each takes seconds.
IN_ONNX = [
    case if n in (2, 4) else pytest.param(*case, marks=pytest.mark.full) for n, case in enumerate(CASES)
]


@pytest.mark.tools
@pytest.mark.parametrize(("name", "call"), IN_ONNX)
def test_onnx(name, call):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    import lstm_ext.onnx

    module, x = layer(name), torch.randn(T, B, I)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = lstm_ext.onnx.export(module, (x,), kwargs=CALLS[call], verbose=False)
    results = [torch.as_tensor(r) for r in program(x, **CALLS[call])]
    close(results, module(x, **CALLS[call]))


@pytest.mark.parametrize(("name", "call"), CASES)
def test_vmap_over_inputs_and_per_sample_gradients(name, call):
    module, xs = layer(name), torch.randn(2, T, B, I)
    each = [module(x, **CALLS[call]) for x in xs]
    close(vmap(lambda x: module(x, **CALLS[call]))(xs), tree_map(lambda *t: torch.stack(t), each[0], each[1]))
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return total(functional_call(module, parameters, (x,), CALLS[call]))

    per_sample = vmap(grad(loss), (None, 0))(parameters, xs)
    for n, x in enumerate(xs):
        expected = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        close([g[n] for g in per_sample.values()], expected)


def test_vmap_over_lengths_resets_and_masks():
    module, x = layer("plain"), torch.randn(T, B, I)
    lengths = torch.tensor([[3, 0, 4], [1, 4, 2]])
    ours = vmap(lambda n: module(x, lengths=n))(lengths)
    for k in range(2):
        close(tree_map(lambda t, k=k: t[k], ours), module(x, lengths=lengths[k]))
    resets = torch.rand(2, T, B) < 0.4
    ours = vmap(lambda r: module(x, resets=r.float(), lengths=LENGTHS))(resets)
    for k in range(2):
        close(tree_map(lambda t, k=k: t[k], ours), module(x, resets=resets[k], lengths=LENGTHS))
    mask = torch.arange(T).view(1, T, 1) < lengths.unsqueeze(1)
    close(vmap(lambda m: module(x, mask=m))(mask), vmap(lambda n: module(x, lengths=n))(lengths))


def test_vmap_over_parameters():
    modules = [layer("norm") for _ in range(2)]
    parameters, _ = torch.func.stack_module_state(modules)
    x = torch.randn(T, B, I)
    ours = vmap(lambda p: functional_call(modules[0], p, (x,), {"lengths": LENGTHS}))(parameters)
    for k, module in enumerate(modules):
        close(tree_map(lambda t, k=k: t[k], ours), module(x, lengths=LENGTHS))


def test_randomness_under_vmap():
    module = lstm_ext.LSTM(I, H, recurrent_dropout=0.5, zoneout=0.5)
    xs = torch.randn(1, T, B, I).expand(2, -1, -1, -1)
    a, b = vmap(lambda x: module(x)[0], randomness="different")(xs)
    assert not torch.equal(a, b)
    a, b = vmap(lambda x: module(x)[0], randomness="same")(xs)
    assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "call"), CASES)
def test_forward_mode(name, call):
    module = layer(name).double()
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64).unbind()

    def output(x):
        return module(x, **CALLS[call])[0]

    if name == "recompute":
        with pytest.raises(RuntimeError, match="recompute=True is not supported with forward-mode AD"):
            jvp(output, (x,), (tangent,))
        return
    step = 1e-6
    slope = (output(x + step * tangent) - output(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(jvp(output, (x,), (tangent,))[1], slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "call"), CASES)
def test_second_derivatives(name, call):
    module = lstm_ext.LSTM(2, 2, **LAYERS[name], dtype=torch.float64).eval()
    x = torch.randn(T, B, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: module(x, **CALLS[call])[0], (x, *module.parameters()))


def test_hessian():
    module = lstm_ext.LSTM(I, H, layer_norm=True, dtype=torch.float64)
    x = torch.randn(T, I, dtype=torch.float64)

    def loss(x):
        return module(x, resets=RESETS[:, 0])[0].sin().sum()

    expected = torch.autograd.functional.hessian(loss, x)
    torch.testing.assert_close(hessian(loss)(x), expected)


@pytest.mark.parametrize(("name", "call"), CASES)
def test_autocast(name, call):
    module, x = layer(name), torch.randn(T, B, I)
    exact = module(x, **CALLS[call])
    hx = torch.randn(2, 4, B, H)
    with torch.autocast("cpu", torch.bfloat16):
        results = module(x, **CALLS[call])
        with_hx = module(x, (hx[0], hx[1]), **CALLS[call])
    # Those of the plain layer of the same kind.
    plain = lstm_ext.LSTM(I, H, 2, bidirectional=True)
    for found, arguments in ((results, (x,)), (with_hx, (x, (hx[0], hx[1])))):
        assert [t.dtype for t in tree_leaves(found[:2])] == torch_dtypes(plain, torch.bfloat16, *arguments)
    # The weights are rounded once, the rest is float32: more than that would show.
    for a, b in zip(tree_leaves(results), tree_leaves(exact), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)
    total(results).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    ("dtype", "computed"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)], ids=str
)
def test_layer_norm_in_the_other_16_bits_under_autocast(dtype, computed):
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, layer_norm=True).to(dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    with torch.autocast("cpu", computed):
        results = module(x)
    plain = lstm_ext.LSTM(I, H, 2, bidirectional=True).to(dtype)
    assert [t.dtype for t in tree_leaves(results)] == torch_dtypes(plain, computed, x)
    exact = lstm_ext.LSTM(I, H, 2, bidirectional=True, layer_norm=True)
    exact.load_state_dict(module.state_dict())
    for a, b in zip(tree_leaves(results), tree_leaves(exact(x.float())), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)
    total(results).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


# recompute


def kept_bytes(module, x, **kwargs) -> int:
    """Of what the graph keeps, without the parameters and the input."""
    own = {p.data_ptr() for p in (*module.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(t):
        if t.data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        results = module(x, **kwargs)
    assert results[0].grad_fn is not None
    return sum(kept.values())


@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
def test_recompute_keeps_less_and_gives_the_same(options):
    lean = lstm_ext.LSTM(I, 16, 2, recompute=True, **options)
    module = lstm_ext.LSTM(I, 16, 2, **options)
    module.load_state_dict(lean.state_dict())
    x = torch.randn(20, 5, I)
    hx = tuple(torch.randn(2, 2, 5, 16).requires_grad_())
    results = []
    for m in (module, lean):
        output, states = m(x, hx)
        loss = output.square().sum() + states[1].sum()
        results.append([output, *states, *torch.autograd.grad(loss, [*hx, *m.parameters()])])
    torch.testing.assert_close(results[0], results[1])
    # Beyond the result; the output of the first layer, which is the input of the second, is counted.
    result = 20 * 5 * 16 * 4
    assert kept_bytes(lean, x) - result <= 0.3 * (kept_bytes(module, x) - result)


@pytest.mark.parametrize(
    ("transform", "call"),
    [
        (f, call)
        for f in (grad, jacrev, lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])))
        for call in ("nothing", "lengths", "mask", "holes", "resets")
    ]
    + [(jacrev, "packed inside")],  # torch's packing has no derivative under the others
)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
def test_recompute_under_transforms(options, call, transform):
    """What the call makes of its arguments belongs to the transform, the sizes of packed data too."""
    lean = lstm_ext.LSTM(I, H, recompute=True, **options)
    module = lstm_ext.LSTM(I, H, **options)
    module.load_state_dict(lean.state_dict())
    holes = {"mask": torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).bool()}

    def of(module):
        def loss(x):
            if call == "packed inside":
                return total(module(pack_padded_sequence(x, [4, 3, 1]))[0].data)
            return total(module(x, **(holes if call == "holes" else CALLS[call])))

        return transform(loss)(x)

    x = torch.randn(T, B, I)
    close(of(lean), of(module))


def test_recompute_draws_the_masks_once():
    options = {"recurrent_dropout": 0.5, "zoneout": (0.3, 0.4), "dropout": 0.5, "num_layers": 2}
    lean = lstm_ext.LSTM(I, H, recompute=True, **options)
    module = lstm_ext.LSTM(I, H, **options)
    module.load_state_dict(lean.state_dict())
    x = torch.randn(T, B, I)
    gradients = []
    for m in (module, lean):
        torch.manual_seed(1)
        output = m(x, lengths=LENGTHS)[0]
        torch.manual_seed(2)
        gradients.append([output, *torch.autograd.grad(output.sin().sum(), list(m.parameters()))])
    torch.testing.assert_close(*gradients)


def test_recompute_notices_a_changed_argument():
    module = lstm_ext.LSTM(I, H, recompute=True)
    x = torch.randn(T, B, I)
    output, _ = module(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_recompute_without_gradients_and_repeated():
    module = lstm_ext.LSTM(I, H, 2, recompute=True)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        assert module(x)[0].grad_fn is None
    loss = module(x)[0].sin().sum()
    first = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["torch.jit.trace", "make_fx"])
def test_a_traced_function_draws_new_masks(how):
    weights = [torch.randn(4 * H, I), torch.randn(4 * H, H), torch.randn(4 * H), torch.randn(4 * H)]
    x = torch.randn(T, B, I)

    def function(x: Tensor) -> Tensor:
        return functional.lstm(x, None, weights, zoneout=0.5, training=True)[0]

    if how == "make_fx":
        traced = make_fx(function, pre_dispatch=True)(x)
    else:
        traced = torch.jit.trace(function, x, check_trace=False)
    for seed in (1, 2):
        torch.manual_seed(seed)
        output = traced(x)
        torch.manual_seed(seed)
        options = internals.LayerOptions(keep_h=torch.rand(1, T, B, H) < 0.5)
        expected = reference.lstm_layer(x, None, None, weights, None, True, False, options)[0]
        torch.testing.assert_close(output, expected)
