"""What a training loop does around the layer: hooks, accumulation, checkpoints, anomaly mode, profiles."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import lstm_ext

pytestmark = [
    pytest.mark.devices("cpu", "cuda"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

CONFIGS = [
    {},
    {"num_layers": 2, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "proj_size": 2, "bias": False},
]
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def pair(**config) -> tuple[lstm_ext.LSTM, nn.LSTM]:
    """Our layer and torch's, with the same weights, each with its own."""
    ours = lstm_ext.LSTM(3, 4, **config, dtype=torch.float64)
    theirs = nn.LSTM(3, 4, **config, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture
def x():
    return torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, **CLOSE)


def gradients(module, *more):
    return [p.grad for p in (*module.parameters(), *more)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_hooks_on_tensors(x, config):
    """Each sees the gradient that torch's layer shows it, and what it returns goes on."""
    seen = []
    for module in pair(**config):
        grads, handles = {}, []

        def keep(name, factor, grads=grads):
            def hook(grad):
                grads[name] = grad.clone()
                return factor * grad

            return hook

        leaf = x.detach().requires_grad_()
        given = leaf * 1
        given.retain_grad()
        given.register_hook(keep("input", 1))
        output, (h_n, c_n) = module(given)
        for factor, (name, tensor) in enumerate((("output", output), ("h_n", h_n), ("c_n", c_n)), start=2):
            tensor.retain_grad()
            tensor.register_hook(keep(name, factor))
        for name, p in module.named_parameters():
            handles.append(p.register_hook(keep(name, 1)))
        module.weight_hh_l0.register_post_accumulate_grad_hook(
            lambda p, grads=grads: grads.__setitem__("accumulated", p.grad.clone())
        )
        (output.square().sum() + h_n.sum() + c_n.square().sum()).backward()
        assert len(grads) == 5 + len(handles)
        same(grads["accumulated"], grads["weight_hh_l0"])
        seen.append([grads, output.grad, h_n.grad, c_n.grad, given.grad, leaf.grad, gradients(module)])
    same(*seen)


def test_hooks_on_the_module(x):
    """Hooks may replace arguments and results; those of the backward pass see torch's gradients."""
    seen = []
    for module in pair():
        calls = []

        def note(name, tensors, calls=calls):
            calls.append((name, [None if t is None else t.detach().clone() for t in tensors]))

        def before(m, args, kwargs, note=note):
            note("before", args)
            return (2 * args[0],), kwargs | {"hx": (torch.ones(1, 2, 4), torch.ones(1, 2, 4))}

        def after(m, args, kwargs, result, note=note):
            assert set(kwargs) == {"hx"}
            output, (h_n, c_n) = result
            note("after", (output, h_n, c_n))
            return 3 * output, (h_n, c_n)

        def to_float64(m, args, kwargs):
            return args, {"hx": tuple(s.double() for s in kwargs["hx"])}

        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_pre_hook(to_float64, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)
        module.register_full_backward_pre_hook(lambda m, grads, note=note: note("backward before", grads[:1]))
        module.register_full_backward_hook(lambda m, grads, _, note=note: note("backward", grads))
        leaf = x.detach().requires_grad_()
        output, (h_n, c_n) = module(leaf)
        (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        assert [name for name, _ in calls] == ["before", "after", "backward before", "backward"]
        seen.append([[tensors for _, tensors in calls], gradients(module, leaf)])
    same(*seen)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_that_nothing_depends_on_has_no_gradient(steps, bidirectional, bias):
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, 2, proj_size=2, bidirectional=bidirectional, bias=bias)
    ours = lstm_ext.convert(copy.copy(theirs), as_subclass=False)
    x = torch.randn(steps, 4, 3)
    gradients = []
    for module in (theirs, ours):
        _, (_, c) = module(x)
        gradients.append(torch.autograd.grad(c.sum(), list(module.parameters()), allow_unused=True))
    without = [[g is None for g in side] for side in gradients]
    assert without[0] == without[1]
    assert any(without[0]) == (steps == 1)


def test_gradients_accumulate(x):
    """In place, each in memory of its own, since each weight is updated in place."""
    layer = pair(num_layers=2)[0]
    layer(x.detach())[0].sum().backward()
    pointers, kept = [g.data_ptr() for g in gradients(layer)], [g.clone() for g in gradients(layer)]
    layer(x.detach())[0].sum().backward()
    same(gradients(layer), [2 * g for g in kept])
    assert [g.data_ptr() for g in gradients(layer)] == pointers
    for set_to_none in (False, True):
        layer.zero_grad(set_to_none=set_to_none)
        layer(x.detach())[0].sum().backward()
        same(gradients(layer), kept)
    assert len({g.untyped_storage().data_ptr() for g in gradients(layer)}) == 8


def test_gradient_of_a_weight_with_other_strides(x):
    ours, theirs = pair()
    for module in (ours, theirs):
        module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach().T.contiguous().T)
        module(x.detach())[0].square().sum().backward()
    same(gradients(ours), gradients(theirs))
    assert ours.weight_ih_l0.grad.stride() == theirs.weight_ih_l0.grad.stride() == ours.weight_ih_l0.stride()


class Cut(torch.autograd.Function):
    """The identity, without a gradient: what comes before sees an undefined one."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_undefined_gradients_of_all_results(x, config):
    """Those of some results are in tests/matrix."""
    module, _ = pair(**config)
    output, (h_n, c_n) = module(x)
    sum(Cut.apply(t).sum() for t in (output, h_n, c_n)).backward()
    assert not any(g is not None and g.any() for g in gradients(module, x))


@pytest.mark.devices("cpu")  # cuDNN's layer has its results in another order
def test_anomaly_mode(x):
    ours, theirs = pair()
    x.data[2, 1, 0] = torch.nan
    errors = []
    for module in (ours, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # anomaly mode announces itself
            with torch.autograd.detect_anomaly():
                module(x[:2])[0].sum().backward()
                with pytest.raises(RuntimeError, match="returned nan values in its") as caught:
                    module(x)[0].sum().backward()
        errors.append(str(caught.value).partition("returned")[2])
    assert errors[0] == errors[1]


def test_profile(x):
    """Both passes have ranges of their own, under the layer's name."""
    layer = lstm_ext.LSTM(3, 4, 2, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss = layer(x)[0].sum()
    forward = {e.key: e.count for e in profile.key_averages() if e.key.startswith("lstm_ext::")}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    backward = {e.key: e.count for e in profile.key_averages() if e.key.startswith("lstm_ext::")}
    assert set(forward.values()) == set(backward.values()) == {2}  # layers
    assert not forward.keys() & backward.keys()


RETURNED = [{}, {"return_cell_states": True}, {"return_gates": True}]
OPTIONS = [
    {"recompute": True},
    {"layer_norm": True},
    {"peephole": True, "zoneout": 0.2, "preactivation_clip": 0.5},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [*CONFIGS, {"bidirectional": True}, *OPTIONS], ids=str)
def test_a_result_changed_in_place(config, dtype):
    """The gradients are those of the change out of place, or there is an error, as in most of torch's own cases."""
    module = lstm_ext.LSTM(3, 4, **config, dtype=dtype).eval()
    x, lengths = torch.randn(5, 2, 3, dtype=dtype), [2, 1, 2, 2, 0] if module.batch_first else [2, 5]
    calls = [lambda more=more: module(x, **more) for more in (*RETURNED, RETURNED[1] | RETURNED[2])]
    calls += [lambda: module(x[0], **RETURNED[2]), lambda: module(x, lengths=lengths, **RETURNED[2])]
    if not module.bidirectional:
        calls.append(lambda: module.step(x[0]))

    def results_of(call):
        return [t for t in tree_leaves(tuple(call())) if t is not None]

    for call in calls:
        for n in range(len(results_of(call))):
            found = []
            for change in (lambda t: t * 0.5, lambda t: t.mul_(0.5)):
                results = results_of(call)
                results[n] = change(results[n])
                loss = sum(t.square().sum() for t in results)
                try:
                    found.append(torch.autograd.grad(loss, list(module.parameters())))
                except RuntimeError as error:
                    assert found and "modified by an inplace operation" in str(error)
            torch.testing.assert_close(found[0], found[-1], rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_memory_that_nobody_has_written(x, config):
    """With deterministic algorithms torch fills new memory with NaN: a kernel that reads it would show."""
    ours, theirs = pair(**config)
    long = torch.randn(40, 40, 3, dtype=torch.float64)
    before = torch.are_deterministic_algorithms_enabled()
    for given in (x.detach(), long):
        found = []
        for module in (ours, theirs):
            module.zero_grad()
            output, (h_n, c_n) = module(given)
            (output.square().sum() + h_n.sum() + c_n.sum()).backward()
            found.append([output, h_n, c_n, *gradients(module)])
        same(*found)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory
            assert torch.empty(9).isnan().all()
            ours.zero_grad()
            with torch.profiler.profile() as profile:
                output, (h_n, c_n) = ours(given)
                (output.square().sum() + h_n.sum() + c_n.sum()).backward()
        finally:
            torch.use_deterministic_algorithms(before)
        # The kernels' own results and saved tensors, beside the few that torch's operators around them need.
        assert sum(event.name == "aten::empty" for event in profile.events()) >= 9 * ours.num_layers
        for a, b in zip([output, h_n, c_n, *gradients(ours)], found[0], strict=True):
            assert torch.equal(a, b)


def test_requires_grad_changes_between_calls(x):
    ours, theirs = pair(num_layers=2)
    for wanted in (False, True, False):
        for module in (ours, theirs):
            module.requires_grad_(wanted)
            assert module(x.detach())[0].requires_grad == wanted
            module.zero_grad()
            module(x)[0].square().sum().backward()
        assert [g is None for g in gradients(ours)] == [not wanted] * 8
        if wanted:
            same(gradients(ours), gradients(theirs))
