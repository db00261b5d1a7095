"""The forward pass seen from outside: forms of the state, memory, what autograd saves, warnings."""

import warnings
from collections import namedtuple

import pytest
import torch
from cases import assert_module_as_accurate_as_torch, tensors
from torch.utils.checkpoint import checkpoint

import lstm_ext

pytestmark = [
    pytest.mark.devices("cpu", "cuda"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

CONFIGS = [
    {},
    {"bias": False},
    {"num_layers": 3},
    {"bidirectional": True},
    {"proj_size": 3},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    {"num_layers": 2, "bidirectional": True, "proj_size": 3, "bias": False},
]


def make_hx(module, *batch, dtype=None):
    directions = 2 if module.bidirectional else 1
    sets = module.num_layers * directions
    dtype = dtype or module.weight_ih_l0.dtype
    return (
        torch.randn(sets, *batch, module.proj_size or module.hidden_size, dtype=dtype),
        torch.randn(sets, *batch, module.hidden_size, dtype=dtype),
    )


def assert_equal(result, expected):
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_forms_of_hx(config):
    module = lstm_ext.LSTM(5, 7, **config)
    x, (h, c) = torch.randn(6, 4, 5), make_hx(module, 4)
    expected = module(x, (h, c))
    State = namedtuple("State", "h c")
    for hx in ([h, c], State(h, c)):
        assert_equal(module(x, hx), expected)
    assert_equal(module(input=x, hx=(h, c)), expected)
    assert isinstance(expected, tuple)
    assert isinstance(expected[1], tuple)
    zeros = (torch.zeros_like(h), torch.zeros_like(c))
    torch.testing.assert_close(module(x), module(x, zeros))
    torch.testing.assert_close(module(x, None), module(x, zeros))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_aliases(config, steps, grad):
    module = lstm_ext.LSTM(5, 7, **config)
    x, hx = torch.randn(steps, 1, 5), make_hx(module, 1)
    given = [x, *hx, *module.parameters()]
    before = [t.clone() for t in given]
    with torch.set_grad_enabled(grad):
        result = tensors(module(x, hx))
    pointers = [t.untyped_storage().data_ptr() for t in [*result, *given]]
    assert len(set(pointers)) == len(pointers)
    with torch.no_grad():
        for t in result:
            t.zero_()
    for t, old in zip(given, before, strict=True):
        assert torch.equal(t, old)


@pytest.mark.parametrize("with_hx", [False, True])
def test_saved_tensors_can_be_moved_or_recomputed(with_hx):
    """save_on_cpu, saved_tensors_hooks and both kinds of checkpoint rest on save_for_backward.

    The checkpoints draw the same dropout again.
    """
    module = lstm_ext.LSTM(5, 7, 2, bidirectional=True, dropout=0.5, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64, requires_grad=True)
    hx = make_hx(module, 4) if with_hx else None
    wanted = [x, *module.parameters()]

    def gradients(run):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        output, (_, c_n) = run(x, hx)
        torch.rand(7)  # the second forward pass must not go on from here
        (output.square().sum() + c_n.sum()).backward()
        return [t.grad for t in wanted]

    def hooked(x, hx):
        def pack(t):
            return t.device, t.detach().to("cpu", copy=True)

        def unpack(kept):
            return kept[1].to(kept[0])

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return module(x, hx)

    def on_cpu(x, hx):
        with torch.autograd.graph.save_on_cpu():
            return module(x, hx)

    def reentrant(x, hx):
        # This kind does not look into nested results.
        output, h_n, c_n = checkpoint(lambda x: tuple(tensors(module(x, hx))), x, use_reentrant=True)
        return output, (h_n, c_n)

    expected = gradients(module)
    for run in (
        hooked,
        on_cpu,
        lambda x, hx: checkpoint(module, x, hx, use_reentrant=False),
        reentrant,
    ):
        for a, b in zip(gradients(run), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_changed_in_place_between_forward_and_backward():
    module = lstm_ext.LSTM(5, 7)
    output, _ = module(torch.randn(6, 4, 5))
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_half_precision(config, dtype):
    module = lstm_ext.LSTM(5, 7, **config, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    assert_module_as_accurate_as_torch(module, torch.randn(6, 4, 5, dtype=dtype), make_hx(module, 4))


def test_warnings_are_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config in CONFIGS:
            module = lstm_ext.LSTM(5, 7, **config)
            module(torch.randn(6, 4, 5))[0].sum().backward()
