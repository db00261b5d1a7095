"""Parameters: read afresh by attribute in every call, and exchanged with torch.nn.LSTM in both directions."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize

import lstm_ext

pytestmark = pytest.mark.devices("cpu", "cuda")

FULL = {"num_layers": 2, "bidirectional": True, "proj_size": 2}


def output_of(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that oneDNN knows no projections
        return module(x)[0]


def assert_same_as_torch(module, x):
    """With the weights that the module has as attributes at this moment."""
    theirs = nn.LSTM(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        module.bias,
        module.batch_first,
        0.0,
        module.bidirectional,
        module.proj_size,
        dtype=x.dtype,
    )
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
    ],
    ids=[
        *("data.copy_", "data.mul_", "data=", "detach", "numpy"),
        *("transposed", "expanded", "every other row", "odd address"),
    ],
)
def test_a_changed_weight_is_seen_by_the_next_call(lstm, x, change, grad):
    lstm.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        lstm(x)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            change(getattr(lstm, name))
            assert_same_as_torch(lstm, x)


def test_set_on_a_parameter(lstm, x):
    before = output_of(lstm, x)
    with torch.no_grad():
        lstm.weight_hh_l0.set_(torch.randn(16, 4, dtype=torch.float64))
    assert not torch.equal(output_of(lstm, x), before)
    assert_same_as_torch(lstm, x)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("implementation", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_optimizer_steps(x, optimizer, implementation):
    torch.manual_seed(0)
    ours = lstm_ext.LSTM(3, 4, **FULL, dtype=torch.float64)
    theirs = nn.LSTM(3, 4, **FULL, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    losses = []
    for module in (ours, theirs):
        steps = optimizer(module.parameters(), lr=0.05, **implementation)
        for _ in range(4):
            loss = output_of(module, x).square().sum()
            losses.append(loss.item())
            steps.zero_grad()
            loss.backward()
            steps.step()
    assert losses[0] > losses[3]
    assert losses[:4] == pytest.approx(losses[4:], rel=1e-10)


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


def test_parameters_as_one_vector(lstm, x):
    """vector_to_parameters: each weight is a piece of the vector, wherever that begins."""
    vector = nn.utils.parameters_to_vector(lstm.parameters()).detach()
    nn.utils.vector_to_parameters(torch.randn(len(vector) + 1, dtype=torch.float64)[1:], lstm.parameters())
    assert not torch.equal(nn.utils.parameters_to_vector(lstm.parameters()), vector)
    assert_same_as_torch(lstm, x)


def test_averaged_model(x):
    ours = lstm_ext.LSTM(3, 4, **FULL, dtype=torch.float64)
    averaged = torch.optim.swa_utils.AveragedModel(
        ours, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    averaged.update_parameters(ours)
    first = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for p in ours.parameters():
        p.data.copy_(torch.randn_like(p))
    assert not torch.equal(output_of(averaged, x), output_of(ours, x))
    averaged.update_parameters(ours)
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p, (first[name] + getattr(ours, name)) / 2)
    assert_same_as_torch(averaged.module, x)


def test_dropped_weights(lstm, x):
    """WeightDrop: the parameter is taken away, a computed tensor of its name takes its place in each call."""
    raw = lstm.weight_hh_l0
    del lstm._parameters["weight_hh_l0"]
    lstm.register_parameter("weight_hh_l0_raw", raw)
    for _ in range(2):
        lstm.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
        assert_same_as_torch(lstm, x)
        raw.grad = None
        lstm(x)[0].sum().backward()
        assert torch.equal(raw.grad == 0, lstm.weight_hh_l0 == 0)


def test_an_instance_attribute_goes_before_the_parameter(lstm, x):
    lstm.__dict__["weight_hh_l0"] = torch.zeros(16, 4, dtype=torch.float64)
    assert_same_as_torch(lstm, x)


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


def test_stack_module_state(lstm, x):
    models = [lstm, lstm_ext.LSTM(3, 4, dtype=torch.float64)]
    parameters, buffers = stack_module_state(models)
    assert not buffers
    for k, model in enumerate(models):
        taken = {name: p[k] for name, p in parameters.items()}
        torch.testing.assert_close(functional_call(lstm, taken, (x,))[0], output_of(model, x))


def test_weight_norm_by_hook(lstm, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch
        torch.nn.utils.weight_norm(lstm, "weight_hh_l0")
    with torch.no_grad():
        lstm.weight_hh_l0_g.mul_(2)
    output = output_of(lstm, x)
    norm = lstm.weight_hh_l0_v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(lstm.weight_hh_l0, lstm.weight_hh_l0_v * lstm.weight_hh_l0_g / norm)
    assert_same_as_torch(lstm, x)
    output.sum().backward()
    assert lstm.weight_hh_l0_g.grad.abs().sum() > 0


def test_weight_norm_by_parametrization(lstm, x):
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    before = output_of(lstm, x)
    with torch.no_grad():
        lstm.parametrizations.weight_hh_l0.original0.mul_(2)
    output = output_of(lstm, x)
    assert not torch.equal(output, before)
    assert_same_as_torch(lstm, x)
    output.sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original0.grad.abs().sum() > 0
    parametrize.remove_parametrizations(lstm, "weight_hh_l0")
    assert_same_as_torch(lstm, x)


@pytest.mark.parametrize("config", [{}, FULL, {"bias": False}], ids=str)
def test_state_dict_both_ways(config):
    ours, theirs = lstm_ext.LSTM(3, 4, **config), nn.LSTM(3, 4, **config)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    other = lstm_ext.LSTM(3, 4, **config)
    other.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(5, 2, 3)
    assert torch.equal(other(x)[0], ours(x)[0])

    meta = lstm_ext.LSTM(3, 4, **config, device="meta")
    meta.load_state_dict(theirs.state_dict(), assign=True)
    assert torch.equal(meta(x)[0], ours(x)[0])

    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "copy", "save"])
def test_copies(way):
    ours = lstm_ext.LSTM(3, 4, **FULL)
    x = torch.randn(5, 2, 3)
    if way == "pickle":
        clone = pickle.loads(pickle.dumps(ours))
    elif way == "save":
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        clone = torch.load(file, weights_only=False)
    else:
        clone = getattr(copy, way)(ours)
    assert torch.equal(clone(x)[0], ours(x)[0])
    with torch.no_grad():
        clone.weight_hh_l0.zero_()
    assert torch.equal(clone(x)[0], ours(x)[0]) == (way == "copy")  # a shallow copy shares its parameters
    assert clone._flat_weights[1] is clone.weight_hh_l0


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


@pytest.mark.parametrize("frozen", range(20))
def test_one_weight_frozen(frozen):
    """Every gradient that remains is what it was."""
    ours = lstm_ext.LSTM(3, 4, **FULL, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    names = [name for name, _ in ours.named_parameters()]
    assert len(names) == 20
    output_of(ours, x).square().sum().backward()
    expected = {name: p.grad for name, p in ours.named_parameters()}
    ours.zero_grad()
    getattr(ours, names[frozen]).requires_grad_(False)
    output_of(ours, x).square().sum().backward()
    assert ours.get_parameter(names.pop(frozen)).grad is None
    for name in names:
        torch.testing.assert_close(getattr(ours, name).grad, expected[name], rtol=1e-12, atol=1e-14)


def test_frozen_weights(lstm, x):
    lstm.weight_hh_l0.requires_grad_(False)
    lstm.bias_ih_l0.requires_grad_(False)
    theirs = nn.LSTM(3, 4, dtype=torch.float64)
    theirs.load_state_dict(lstm.state_dict())
    lstm(x)[0].sum().backward()
    theirs(x)[0].sum().backward()
    assert lstm.weight_hh_l0.grad is None
    assert lstm.bias_ih_l0.grad is None
    torch.testing.assert_close(lstm.weight_ih_l0.grad, theirs.weight_ih_l0.grad)
    torch.testing.assert_close(lstm.bias_hh_l0.grad, theirs.bias_hh_l0.grad)

    lstm.requires_grad_(False)
    assert not lstm(x)[0].requires_grad
    x.requires_grad_()
    lstm(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0
