"""Every combination of options, values and gradients, against the oracle of the tests."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import Result, drawn, oracle
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_ext
from lstm_ext.call import masks, values

T, B, I, H, P = 4, 4, 3, 5, 2

LAYERS = {
    "one": {},
    "two directions": {"bidirectional": True},
    "two layers": {"num_layers": 2, "bias": False, "batch_first": True},
    "all": {"num_layers": 2, "bidirectional": True, "proj_size": P, "batch_first": True},
}
CELLS = {
    "plain": {},
    "norm": {"layer_norm": True, "forget_bias": None},
    "zoneout, evaluation": {"zoneout": (0.3, 0.2)},
    "peephole": {"peephole": True},
    "clip": {"cell_clip": 0.25},
    "peephole, clip, coupled": {
        "peephole": True,
        "cell_clip": 0.4,
        "coupled_gates": True,
        "zoneout": 0.3,
        "recompute": True,
    },
    "activations": {
        "gate_activation": "hard_sigmoid",
        "cell_activation": (("scaled_tanh", 0.9, 1.1), "softsign"),
        "preactivation_clip": 0.6,
        "peephole": True,
    },
    "random": {"zoneout": (0.3, 0.2), "recurrent_dropout": 0.4, "weight_dropout": 0.3},
    "all, recomputed": {
        "zoneout": 0.3,
        "recurrent_dropout": 0.4,
        "layer_norm": True,
        "recompute": True,
    },
}
LENGTHS = [3, 0, 4, 2]
# How a sequence's end is said, and what computes it.
FORMS = ["dense", "unbatched", "lengths", "mask", "lengths unread", "mask unread", "packed"]


def make(layer: str, cell: str) -> lstm_ext.LSTM:
    module = lstm_ext.LSTM(I, H, dtype=torch.float64, **LAYERS[layer], **CELLS[cell])
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith(("ln_", "weight_c")):
                p.add_(0.3 * torch.randn_like(p))
    return module.train(cell in ("random", "all, recomputed"))


def states(module: lstm_ext.LSTM, batch: int = B) -> tuple[Tensor, Tensor]:
    sets = module.num_layers * (2 if module.bidirectional else 1)
    return tuple(
        torch.randn(sets, batch, n, dtype=torch.float64).requires_grad_()
        for n in (module.proj_size or module.hidden_size, module.hidden_size)
    )


def call(module, form, x, hx, lengths, resets, reset_state) -> Result:
    """The module's results, time first; packed ones padded again."""
    kwargs = {"return_cell_states": True, "return_gates": True}
    batch_first = module.batch_first and form not in ("unbatched", "packed")

    def laid(t):
        return t if t is None or not batch_first else t.transpose(0, 1)

    if form == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        if resets is not None:
            kwargs["resets"] = pack_padded_sequence(resets, lengths, enforce_sorted=False)
            kwargs["reset_state"] = reset_state
        output, (h_n, c_n), extras = module(packed, hx, **kwargs)
        rows = pack_padded_sequence(
            torch.arange(x.size(0) * x.size(1)).view(x.shape[:2]), lengths, enforce_sorted=False
        ).data

        def padded(data, dim):
            shape = [*data.shape[:dim], x.size(0) * x.size(1), *data.shape[dim + 1 :]]
            return data.new_zeros(shape).index_copy(dim, rows, data).unflatten(dim, x.shape[:2])

        return Result(padded(output.data, 0), h_n, c_n, *[padded(e, 1) for e in extras])
    if form == "unbatched":
        if resets is not None:
            kwargs["resets"] = resets[:, 0]
            kwargs["reset_state"] = reset_state and tuple(s[:, 0] for s in reset_state)
        output, (h_n, c_n), extras = module(x[:, 0], hx and tuple(s[:, 0] for s in hx), **kwargs)
        return Result(*[t.unsqueeze(1) for t in (output, h_n, c_n)], *[e.unsqueeze(2) for e in extras])
    kwargs |= {"resets": laid(resets), "reset_state": reset_state}
    if "lengths" in form:
        kwargs["lengths"] = torch.tensor(lengths) if "unread" in form else lengths
    if "mask" in form:
        kwargs["mask"] = laid(torch.arange(x.size(0)).unsqueeze(1) < torch.tensor(lengths))
    output, (h_n, c_n), extras = module(laid(x), hx, **kwargs)
    if batch_first:
        output, extras = output.transpose(0, 1), [e.transpose(1, 2) for e in extras]
    return Result(output, h_n, c_n, *extras)


def assert_equal_gradients(ours: Result, expected: Result, leaves: dict[str, Tensor]) -> None:
    """Values, and the gradients for random gradients of all results."""
    for name, a, b in zip(Result._fields, ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    grads = [torch.randn_like(t) for t in ours]
    gradients = [
        torch.autograd.grad(results, list(leaves.values()), grads, materialize_grads=True, allow_unused=True)
        for results in (ours, expected)
    ]
    for name, a, b in zip(leaves, *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"gradient of {n}: {m}")


def cases():
    for layer in LAYERS:
        for cell in CELLS:
            for cut in ("no resets", "to zeros", "to a state"):
                often = layer == "all" or (cell in ("plain", "norm", "peephole") and cut == "to a state")
                yield pytest.param(layer, cell, cut, marks=[] if often else pytest.mark.full)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("layer", "cell", "cut"), list(cases()))
def test_values_and_gradients(layer, cell, cut, form, monkeypatch):
    module = make(layer, cell)
    batch = 1 if form == "unbatched" else B
    lengths = {"dense": None, "unbatched": None, "packed": [3, 1, 4, 2]}.get(form, LENGTHS)
    x = torch.randn(T, batch, I, dtype=torch.float64, requires_grad=True)
    hx, reset_state, resets = states(module, batch), None, None
    if cut != "no resets":
        resets = torch.rand(T, batch) < 0.4
        resets[0, 0] = True
    if cut == "to a state":
        reset_state = states(module, batch)
    if "unread" in form:
        monkeypatch.setattr(values, "is_readable", lambda x: False)

    torch.manual_seed(1)
    ours = call(module, form, x, hx, lengths, resets, reset_state)
    torch.manual_seed(1)
    masks = drawn(module, T, batch, None if "unread" in form else lengths)
    expected = oracle(module, x, hx, lengths, resets, reset_state, masks)
    leaves = {"x": x, "h0": hx[0], "c0": hx[1], **dict(module.named_parameters())}
    if reset_state is not None:
        leaves |= {"reset h": reset_state[0], "reset c": reset_state[1]}
    assert_equal_gradients(ours, expected, leaves)


def test_the_oracle_is_torchs_layer():
    """Where there is nothing else: what everything above is compared with."""
    module = make("all", "plain")
    theirs = lstm_ext.revert(copy.copy(module))
    x, hx = torch.randn(T, B, I, dtype=torch.float64), states(module)
    expected = oracle(module, x, hx)
    output, (h_n, c_n) = theirs(x.transpose(0, 1), hx)
    for a, b in zip(expected, (output.transpose(0, 1), h_n, c_n), strict=False):
        torch.testing.assert_close(a, b)


def test_gradients_of_each_result_alone():
    module = make("all", "norm")
    x, hx = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True), states(module)
    resets = torch.rand(T, B) < 0.3
    leaves = [x, *hx, *module.parameters()]
    ours = call(module, "lengths", x, hx, LENGTHS, resets, None)
    expected = oracle(module, x, hx, LENGTHS, resets)
    for a, b in zip(ours, expected, strict=True):
        grad = torch.randn_like(a)
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        for g, e in zip(
            torch.autograd.grad(a, leaves, grad, **options),
            torch.autograd.grad(b, leaves, grad, **options),
            strict=True,
        ):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("returned", ["return_cell_states", "return_gates"])
def test_one_of_the_two_results(returned):
    module = lstm_ext.LSTM(I, H, 2)
    x = torch.randn(T, B, I)
    output, states_, extras = module(x, **{returned: True})
    assert isinstance(extras, lstm_ext.LSTMExtras)
    plain, plain_states = module(x)
    torch.testing.assert_close((output, states_), (plain, plain_states))
    if returned == "return_cell_states":
        assert extras.gates is None
        assert extras.cell_states.shape == (2, T, B, H)
        torch.testing.assert_close(extras.cell_states[:, -1], plain_states[1])
    else:
        assert extras.cell_states is None
        assert extras.gates.shape == (2, T, B, H, 4)


def test_stateless_function_equals_the_module():
    module = make("all", "all, recomputed")
    x, hx, reset_state = torch.randn(B, T, I, dtype=torch.float64), states(module), states(module)
    resets = torch.rand(B, T, 1).round()
    call_ = {"resets": resets, "reset_state": reset_state, "lengths": LENGTHS, "return_gates": True}
    torch.manual_seed(1)
    expected = module(x, hx, **call_)
    plain = [p for name, p in module.named_parameters() if not name.startswith("ln_")]
    norm = [p for name, p in module.named_parameters() if name.startswith("ln_")]
    options = {"recurrent_dropout": 0.4, "zoneout": 0.3, "norm_weights": norm, "recompute": True}
    for function in (lstm_ext.functional.lstm, lstm_ext.reference.lstm):
        torch.manual_seed(1)
        ours = function(x, hx, plain, True, 2, 0.0, True, True, True, **call_, **options)
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_once(dtype):
    x, resets = torch.randn(T, B, I, dtype=dtype), torch.rand(T, B) < 0.3
    layer = lstm_ext.LSTM(I, H, layer_norm=True, zoneout=(0.2, 0.3), dtype=dtype).eval()
    layer(x, resets=resets)[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    ours = layer(x, resets=resets, return_gates=True, return_cell_states=True)
    exact = layer.double()(x.double(), resets=resets, return_gates=True, return_cell_states=True)
    assert {t.dtype for t in (ours[0], *ours[1], *ours[2])} == {dtype}
    for a, b in zip((ours[0], *ours[1], *ours[2]), (exact[0], *exact[1], *exact[2]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masks_of_16_bit_layers_are_not_rounded(dtype):
    drawn = []
    for own in (dtype, torch.float32):
        torch.manual_seed(1)
        drawn.append(masks.recurrent_mask(torch.ones(3, 2, 4, dtype=own), None, None, 1, 50, 0.3))
    assert torch.equal(*drawn)
