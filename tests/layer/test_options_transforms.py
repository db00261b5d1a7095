"""What recompute keeps, dtypes of options under autocast, and masks that tracers draw; tests/matrix has the numbers."""

from __future__ import annotations

import internals
import pytest
import torch
from judge import torch_dtypes
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves

import lstm_ext
from lstm_ext import functional, reference
from lstm_ext.native import loader

T, B, I, H = 4, 3, 3, 4
LENGTHS = torch.tensor([3, 0, 4])
CALLS = {
    "lengths": {"lengths": LENGTHS},
    "holes": {"mask": torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 0]]).bool()},
    "resets": {
        "resets": torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).bool(),
        "return_gates": True,
    },
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def total(results) -> Tensor:
    return sum(t.sin().sum() for t in tree_leaves(results) if t is not None)


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
    [(f, call) for f in (grad, lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x]))) for call in CALLS]
    + [(jacrev, "packed inside")],  # torch's packing has no derivative under the others
)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=str)
def test_recompute_under_transforms(options, call, transform):
    """What the call makes of its arguments belongs to the transform, the sizes of packed data too."""
    lean = lstm_ext.LSTM(I, H, recompute=True, **options)
    module = lstm_ext.LSTM(I, H, **options)
    module.load_state_dict(lean.state_dict())

    def of(module):
        def loss(x):
            if call == "packed inside":
                return total(module(pack_padded_sequence(x, [4, 3, 1]))[0].data)
            return total(module(x, **CALLS[call]))

        return transform(loss)(x)

    x = torch.randn(T, B, I)
    torch.testing.assert_close(of(lean), of(module), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="recompute=True is not supported with forward-mode AD"):
        jvp(lambda x: lean(x)[0], (x,), (x,))


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


AUTOCAST = [
    (torch.float32, torch.bfloat16, {}, {}),
    (torch.float32, torch.bfloat16, {"peephole": True}, CALLS["lengths"]),
    (torch.float32, torch.bfloat16, {"layer_norm": True}, CALLS["resets"]),
    (torch.float16, torch.bfloat16, {"layer_norm": True}, {}),
    (torch.bfloat16, torch.float16, {"layer_norm": True}, {}),
]


@pytest.mark.parametrize(("dtype", "computed", "options", "call"), AUTOCAST, ids=str)
def test_dtypes_under_autocast(dtype, computed, options, call):
    """Those of the plain layer of the same kind; the weights are rounded once, and the rest is float32."""
    module = lstm_ext.LSTM(I, H, 2, bidirectional=True, **options).to(dtype)
    x, hx = torch.randn(T, B, I, dtype=dtype), torch.randn(2, 4, B, H, dtype=dtype).unbind()
    plain = lstm_ext.LSTM(I, H, 2, bidirectional=True).to(dtype)
    with torch.autocast("cpu", computed):
        results, with_hx = module(x, **call), module(x, hx, **call)
    for found, states in ((results, ()), (with_hx, (hx,))):
        assert [t.dtype for t in tree_leaves(found[:2])] == torch_dtypes(plain, computed, x, *states)
    exact = lstm_ext.LSTM(I, H, 2, bidirectional=True, **options)
    exact.load_state_dict(module.state_dict())
    for a, b in zip(tree_leaves(results[:2]), tree_leaves(exact(x.float(), **call)[:2]), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.02, atol=0.02)
    total(results).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())


def test_packed_options_without_kernels_are_refused_by_compilers(monkeypatch):
    monkeypatch.setattr(loader, "has_kernels", lambda: False)
    packed = pack_sequence([torch.randn(n, I) for n in (4, 2)])
    module = lstm_ext.LSTM(I, H, layer_norm=True)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="do not support a PackedSequence together with options"):
        torch.compile(module, backend="eager", fullgraph=True)(packed)
    with pytest.raises(Exception, match="do not support a PackedSequence together with options"):
        torch.export.export(module, (packed,), strict=False)


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
