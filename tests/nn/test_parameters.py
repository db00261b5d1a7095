"""Parameters: read afresh by attribute in every call, plain or computed, and exchanged with torch's layers."""

import copy
import inspect
import io
import warnings

import pytest
import torch
from lstm_models import COMPUTED
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize

import lstm_ext

pytestmark = pytest.mark.devices("cpu", "cuda")

FULL = {"num_layers": 2, "bidirectional": True, "proj_size": 2}
SIZES = list(inspect.signature(lstm_ext.LSTM).parameters)[:8]


def output_of(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that oneDNN knows no projections
        return module(x)[0]


def assert_same_as_torch(module, x):
    """With the weights that the module has as attributes at this moment."""
    sizes = (getattr(module, name) for name in SIZES)
    theirs = nn.LSTM(*sizes, dtype=x.dtype)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(getattr(module, name))
    torch.testing.assert_close(output_of(module, x), output_of(theirs, x), rtol=1e-10, atol=1e-12)


@pytest.fixture
def lstm():
    return lstm_ext.LSTM(3, 4, dtype=torch.float64)


@pytest.fixture
def x():
    return torch.randn(5, 2, 3, dtype=torch.float64)


def set_storage(p):
    with torch.no_grad():
        p.set_(torch.randn_like(p))


def fill_past_torch(p, value):
    """Through memory that two libraries share, of which torch's counter of changes knows nothing."""
    if p.is_cpu:
        p.detach().numpy().fill(value)
    else:
        torch.from_dlpack(p.detach()).fill_(value)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.data.copy_(torch.randn_like(p)),
        lambda p: p.data.mul_(2),
        lambda p: setattr(p, "data", torch.randn_like(p)),
        lambda p: p.detach().fill_(0.1),
        lambda p: fill_past_torch(p, 0.25),
        lambda p: setattr(p, "data", torch.randn_like(p.movedim(0, -1).contiguous()).movedim(-1, 0)),
        lambda p: setattr(p, "data", torch.randn_like(p[:1]).expand_as(p)),
        lambda p: setattr(p, "data", torch.randn_like(p.repeat_interleave(2, dim=0))[::2]),
        lambda p: setattr(p, "data", torch.randn(p.numel() + 1, dtype=p.dtype)[1:].view_as(p)),
        set_storage,
    ],
    ids=[
        *("data.copy_", "data.mul_", "data=", "detach", "numpy"),
        *("transposed", "expanded", "every other row", "odd address", "set_"),
    ],
)
def test_a_changed_weight_is_seen_by_the_next_call(lstm, x, change, grad):
    lstm.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        lstm(x)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            change(getattr(lstm, name))
            assert_same_as_torch(lstm, x)


def test_assignment_and_tying(lstm, x):
    other = lstm_ext.LSTM(3, 4, dtype=torch.float64)
    lstm.weight_hh_l0 = other.weight_hh_l0
    assert lstm._flat_weights[1] is other.weight_hh_l0
    assert_same_as_torch(lstm, x)
    lstm.bias_hh_l0 = lstm.bias_ih_l0
    assert_same_as_torch(lstm, x)
    (lstm(x)[0].sum() + other(x)[0].sum()).backward()
    assert other.weight_hh_l0.grad is lstm.weight_hh_l0.grad

    name = "weight_hh_l0"
    del lstm._parameters[name]
    with pytest.raises(AttributeError, match=name):
        lstm(x)
    lstm.register_parameter(name, nn.Parameter(torch.randn(16, 4, dtype=torch.float64)))
    assert_same_as_torch(lstm, x)


def test_delete_and_add_again(lstm, x):
    weight = lstm.weight_hh_l0
    del lstm.weight_hh_l0
    with pytest.raises(AttributeError, match="weight_hh_l0"):
        lstm(x)
    lstm.weight_hh_l0 = nn.Parameter(2 * weight.detach())
    assert_same_as_torch(lstm, x)
    assert [name for name, _ in lstm.named_parameters()][-1] == "weight_hh_l0"
    assert lstm._flat_weights[1] is lstm.weight_hh_l0
    assert lstm.all_weights[0][1] is lstm.weight_hh_l0

    del lstm.bias_ih_l0
    lstm.register_buffer("bias_ih_l0", torch.randn(16, dtype=torch.float64))
    assert_same_as_torch(lstm, x)
    lstm(x)[0].sum().backward()
    assert lstm.bias_hh_l0.grad.abs().sum() > 0


def test_all_weights_follow(lstm, device):
    def assert_follow():
        assert all(
            a is getattr(lstm, name)
            for a, name in zip(lstm._flat_weights, lstm._flat_weights_names, strict=True)
        )
        assert [id(w) for w in lstm.all_weights[0]] == [id(w) for w in lstm._flat_weights]

    lstm.weight_ih_l0 = nn.Parameter(torch.zeros(16, 3, dtype=torch.float64))
    assert_follow()
    lstm.float()
    assert_follow()
    lstm.to_empty(device="meta")
    assert_follow()
    assert lstm.weight_ih_l0.is_meta
    lstm.to_empty(device=device).reset_parameters()
    assert_follow()


def test_functional_call(lstm, x):
    before = output_of(lstm, x)
    others = {name: torch.randn_like(p) for name, p in lstm.named_parameters()}
    output, _ = functional_call(lstm, others, (x,))
    assert torch.equal(output_of(lstm, x), before)
    lstm.load_state_dict(others)
    torch.testing.assert_close(output, output_of(lstm, x))

    half = {name: p.float() for name, p in others.items()}
    assert functional_call(lstm, half, (x.float(),))[0].dtype == torch.float32


def test_functional_call_in_a_model(x):
    """Names with a prefix, weights tied by the model, some parameters only."""
    model = nn.Sequential(lstm_ext.LSTM(3, 3, dtype=torch.float64), lstm_ext.LSTM(3, 3, dtype=torch.float64))
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    model.forward = lambda x: model[1](model[0](x)[0])[0]
    weight = torch.randn(12, 3, dtype=torch.float64)
    output = functional_call(model, {"0.weight_hh_l0": weight}, (x,))
    before = model(x)
    with torch.no_grad():
        model[0].weight_hh_l0.copy_(weight)
    assert torch.equal(output, model(x))
    assert not torch.equal(output, before)


def test_functional_call_gradients(lstm, x):
    weights = {name: p.detach().clone().requires_grad_() for name, p in lstm.named_parameters()}
    functional_call(lstm, weights, (x,))[0].sum().backward()
    lstm(x)[0].sum().backward()
    for name, p in lstm.named_parameters():
        torch.testing.assert_close(weights[name].grad, p.grad)


@pytest.mark.parametrize("config", [{}, FULL, {"bias": False}, None], ids=str)
def test_state_dict_both_ways(config):
    """Of layers, and of cells (None)."""
    name, options = ("LSTMCell", {}) if config is None else ("LSTM", config)
    ours, theirs, other, meta = (
        getattr(package, name)(3, 4, **options, device=device)
        for package, device in ((lstm_ext, None), (nn, None), (lstm_ext, None), (lstm_ext, "meta"))
    )
    assert list(ours.state_dict()) == list(theirs.state_dict())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True), strict=True)
    other.load_state_dict(theirs.state_dict(), strict=True)
    meta.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(2, 3)
    assert torch.equal(other(x)[0], ours(x)[0]) and torch.equal(meta(x)[0], ours(x)[0])


def test_state_from_before_proj_size():
    """Modules pickled before torch 1.8 lack proj_size and keep the parameters themselves in _all_weights."""
    ours = lstm_ext.LSTM(3, 4, 2, bidirectional=True)
    state = ours.__getstate__()
    del state["proj_size"]
    state["all_weights"] = ours.all_weights
    for name in ("_all_weights", "_flat_weights_names"):
        del state[name]
    old = lstm_ext.LSTM.__new__(lstm_ext.LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    x = torch.randn(5, 2, 3)
    assert torch.equal(old(x)[0], ours(x)[0])


def test_conversions_of_dtype_and_sharing(lstm, x):
    expected = output_of(lstm, x)
    assert lstm.float()(x.float())[0].dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert lstm.to(dtype)(x.to(dtype))[0].dtype == dtype
        assert all(w.dtype == dtype for w in lstm._flat_weights)
    assert lstm.share_memory() is lstm
    assert all(p.is_shared() for p in lstm.parameters())
    assert torch.isfinite(output_of(lstm, x)).all()
    assert output_of(lstm, x).shape == expected.shape


def test_frozen_weights(lstm, x):
    lstm.weight_hh_l0.requires_grad_(False)
    lstm(x)[0].sum().backward()
    assert [p.grad is None for p in lstm.parameters()] == [False, True, False, False]
    lstm.requires_grad_(False)
    assert not lstm(x)[0].requires_grad
    x.requires_grad_()
    lstm(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


# --- weights that are computed

# One of each kind, in the first layer and in the last direction.
NAMES = ("weight_hh_l0", "weight_ih_l1_reverse", "weight_hr_l0", "bias_ih_l1")
# What has norms, or structure, has matrices.
OF_ALL = ("softplus", "pruned", "pruned at random")


@pytest.fixture
def module():
    return lstm_ext.LSTM(3, 4, **FULL, dtype=torch.float64)


def results(module, call):
    """Outputs, and the gradients of the parameters that there are."""
    output, (h_n, c_n) = call()
    module.zero_grad()
    (output.square().sum() + h_n.sum() + c_n.sum()).backward()
    gradients = {f"grad of {name}": p.grad for name, p in module.named_parameters()}
    return {"output": output, "h_n": h_n, "c_n": c_n} | gradients


def by_equations(module, x):
    weights = [getattr(module, name) for name in module._flat_weights_names]
    return lstm_ext.reference.lstm(x, None, weights, num_layers=2, bidirectional=True)


@pytest.mark.parametrize("way", COMPUTED)
def test_computed_weights(module, x, way):
    plain = [name for name, _ in module.named_parameters()]
    before = copy.deepcopy(module)
    add, remove = COMPUTED[way]
    names = NAMES if way in OF_ALL else NAMES[:3]
    for name in names:
        add(module, name)
    if "weight_norm" in way:  # which begins with the weight as it was
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.endswith(("_g", "original0")):
                    p.mul_(2)
    module.eval()  # spectral_norm then takes the same step for every reader
    # By hook, the tensor lies in the module from the last call on, with a graph that a backward pass uses up.
    ours = results(module, lambda: module(x))
    module(x)
    expected = results(module, lambda: by_equations(module, x))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    assert len(ours) >= 3 + len(plain)
    assert all(gradient.abs().sum() > 0 for gradient in ours.values())
    assert not torch.allclose(ours["output"], before(x)[0])

    for name in names:
        remove(module, name)
    assert sorted(name for name, _ in module.named_parameters()) == sorted(plain)
    torch.testing.assert_close(module(x)[0], ours["output"], rtol=1e-10, atol=1e-12)
    assert_same_as_torch(module, x)


def test_cached_parametrization(module, x):
    """Within the context every reader, the module among them, gets the same tensor."""
    calls = []

    class Counted(nn.Module):
        def forward(self, w):
            calls.append(w)
            return w * 2

    parametrize.register_parametrization(module, "weight_hh_l0", Counted())
    calls.clear()
    expected = module(x)[0]
    assert len(calls) == 1  # one step of a module reads each weight once
    with parametrize.cached():
        first, second = module(x)[0], module(x)[0]
        assert len(calls) == 2
    assert torch.equal(first, expected) and torch.equal(second, expected)


def test_copies_of_a_parametrized_module(module, x):
    parametrizations.weight_norm(module, "weight_hh_l0")
    clone = copy.deepcopy(module)
    assert torch.equal(clone(x)[0], module(x)[0])
    with torch.no_grad():
        clone.parametrizations.weight_hh_l0.original0.mul_(2)
    assert not torch.equal(clone(x)[0], module(x)[0])
    other = lstm_ext.LSTM(3, 4, **FULL, dtype=torch.float64)
    parametrizations.weight_norm(other, "weight_hh_l0")
    other.load_state_dict(clone.state_dict())
    assert torch.equal(other(x)[0], clone(x)[0])


# Where a dropped weight is put, so that the module finds it.
PLACES = {
    "attribute": setattr,
    "_parameters": lambda module, name, weight: module._parameters.__setitem__(name, weight),
    "__dict__": lambda module, name, weight: module.__dict__.__setitem__(name, weight),
}


@pytest.mark.parametrize("place", PLACES)
def test_dropped_weights(module, x, place):
    """As AWD-LSTM and its successors do it."""
    names, before = ("weight_hh_l0", "weight_hh_l1_reverse"), module(x)[0]
    raw = [module._parameters.pop(name) for name in names]
    for _ in range(2):
        for name, weight in zip(names, raw, strict=True):
            PLACES[place](module, name, nn.functional.dropout(weight, 0.5))
        output = module(x)[0]
        torch.testing.assert_close(output, by_equations(module, x)[0])
        assert not torch.equal(output, before)
        for name, gradient in zip(names, torch.autograd.grad(output.sum(), raw), strict=True):
            dropped = getattr(module, name) == 0
            assert 0 < dropped.sum() < dropped.numel() and torch.equal(gradient == 0, dropped)
