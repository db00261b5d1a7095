"""lstm_ext.LSTMCell beside torch.nn.LSTMCell. Its numbers are those of the route `cells` of tests/matrix, too."""

import copy

import cases
import pytest
import torch
from devices import moved
from judge import assert_as_accurate_as_torch, relative_error, stacked, torch_dtypes
from torch import nn

import lstm_ext

pytestmark = pytest.mark.devices("cpu", "cuda")

zeros = torch.zeros


def to_torch(cell):
    """By hand: revert has tests of its own."""
    theirs = nn.LSTMCell(
        cell.input_size, cell.hidden_size, cell.bias is not False, dtype=cell.weight_ih.dtype
    )
    theirs.load_state_dict(cell.state_dict())
    return theirs


def make_hx(cell, *batch):
    return tuple(torch.randn(*batch, cell.hidden_size, dtype=cell.weight_ih.dtype) for _ in range(2))


# Results and gradients


class Holder(nn.Module):
    """The cell with the results of a layer."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, hx):
        h, c = self.cell(x, hx)
        return h, (h, c)


def values_and_gradients(cell, x, hx, grad_of=("h_n", "c_n"), dtype=None):
    return cases.values_and_gradients(Holder(cell), x, hx, grad_of=grad_of, dtype=dtype)


@pytest.mark.parametrize("grad_of", [("h_n", "c_n"), ("h_n",), ("c_n",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "state", "bias"), [((), False, True), ((1,), True, False), ((5,), True, True)]
)
def test_values_and_gradients(batch, state, bias, dtype, grad_of):
    cell = lstm_ext.LSTMCell(17, 9, bias, dtype=dtype)
    theirs, results = to_torch(cell), []
    for _ in range(4):
        x, hx = torch.randn(*batch, 17, dtype=dtype), make_hx(cell, *batch) if state else None
        sides = ((cell, None), (theirs, None), (theirs, torch.float64))
        results.append([values_and_gradients(m, x, hx, grad_of, d) for m, d in sides])
    assert_as_accurate_as_torch(*(stacked(side) for side in zip(*results, strict=True)))


def test_states_changed_in_place():
    """As the cell is used: a loop, states changed in place, part of the batch replaced."""
    results = []
    cell = lstm_ext.LSTMCell(3, 4, dtype=torch.float64)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    # On the CPU: torch's fused cell for GPUs saves its result c, and does not let it be changed.
    for module, given in ((cell, x), (copy.deepcopy(to_torch(cell)).cpu(), x.cpu())):
        h = c = zeros(2, 4, dtype=torch.float64, device=given.device)
        loss = 0
        for t in range(6):
            h, c = module(given[t], (h, c))
            h[1] *= 0.5
            c.mul_(torch.tensor([[1.0], [0.0]], device=given.device) if t == 3 else 1)
            loss = loss + h.square().sum()
        loss.backward()
        results.append([loss, *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        assert relative_error(a.cpu(), b) <= 1e-14


LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "features apart": lambda x: torch.stack([x, x], dim=-1)[..., 1],
    "every other row": lambda x: torch.cat([x, x], dim=1)[:, : x.size(1)],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
    "expanded over batch": lambda x: x[:1].expand_as(x),
    "expanded over features": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    cell = lstm_ext.LSTMCell(5, 7)
    given = [LAYOUTS[layout](x) for x in (torch.randn(4, 5), *make_hx(cell, 4))]
    dense = [x.contiguous() for x in given]
    out_grads = [LAYOUTS[layout](torch.randn(4, 7)) for _ in range(2)]
    results = []
    for x, h, c in (given, dense):
        leaves = [t.detach().requires_grad_() for t in (x, h, c)]
        outputs = cell(leaves[0], (leaves[1], leaves[2]))
        grads = torch.autograd.grad(outputs, [*leaves, *cell.parameters()], out_grads)
        results.append([*outputs, *grads])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)

    weights = {name: p.detach().clone() for name, p in cell.named_parameters()}
    weights["weight_hh"] = weights["weight_hh"].t().contiguous().t()
    weights["weight_ih"] = torch.stack([weights["weight_ih"]] * 2, -1)[..., 0]
    h, c = torch.func.functional_call(cell, weights, (dense[0], tuple(dense[1:])))
    assert torch.equal(h, results[1][0])
    assert torch.equal(c, results[1][1])


def test_results_share_no_memory():
    cell = lstm_ext.LSTMCell(3, 4)
    x, (h, c) = torch.randn(2, 3), make_hx(cell, 2)
    before = [t.clone() for t in (x, h, c)]
    results = cell(x, (h, c))
    memory = {t.untyped_storage().data_ptr() for t in (x, h, c, *results, *cell.parameters())}
    assert len(memory) == 9
    assert all(torch.equal(a, b) for a, b in zip(before, (x, h, c), strict=True))


def test_forms_of_hx():
    cell = lstm_ext.LSTMCell(3, 4)
    x, (h, c) = torch.randn(2, 3), make_hx(cell, 2)
    expected = cell(x, (h, c))
    assert type(expected) is tuple
    assert all(torch.equal(a, b) for a, b in zip(cell(x, [h, c]), expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(cell(input=x, hx=(h, c)), expected, strict=True))
    none = cell(x)
    assert all(torch.equal(a, b) for a, b in zip(cell(x, (zeros(2, 4), zeros(2, 4))), none, strict=True))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("batch", "features", "hidden"), [((0,), 3, 4), ((2,), 0, 4), ((2,), 3, 0), ((), 0, 4), ((), 3, 0)]
)
def test_empty_sizes(batch, features, hidden):
    cell = lstm_ext.LSTMCell(features, hidden)
    x = torch.randn(*batch, features)
    for hx in (None, make_hx(cell, *batch)):
        ours, theirs = (values_and_gradients(m, x, hx) for m in (cell, to_torch(cell)))
        torch.testing.assert_close(ours, theirs)


# Autocast and vmap


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_autocast(dtype, batch, device):
    cell = lstm_ext.LSTMCell(3, 4)
    x, (h, c) = torch.randn(*batch, 3), make_hx(cell, *batch)
    low = copy.deepcopy(cell).to(dtype)
    with torch.autocast(device, dtype=dtype):
        for given, hx in (
            (x, None),
            (x, (h, c)),
            (x.to(dtype), (h, c.to(dtype))),
            (x, (h.to(dtype), c)),
        ):
            results = cell(given, hx)
            assert [t.dtype for t in results] == torch_dtypes(cell, dtype, given, hx)
            expected = low(x.to(dtype), None if hx is None else (h.to(dtype), c.to(dtype)))
            for a, b in zip(results, expected, strict=True):
                assert torch.equal(a, b.to(a.dtype))
        results[0].sum().backward()
        double = lstm_ext.LSTMCell(3, 4, dtype=torch.float64)
        assert double(x.double())[0].dtype == torch.float64
        for bad in (x.double(), x.long()):
            errors = []
            for kind in (lstm_ext.LSTMCell, nn.LSTMCell):
                with pytest.raises(Exception) as caught:
                    kind(3, 4)(bad)
                errors.append((caught.type, str(caught.value)))
            assert errors[0] == errors[1]
    assert all(p.grad.dtype == torch.float32 for p in cell.parameters())
    assert cell.weight_hh.grad.any()


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_vmap(batch):
    cell = lstm_ext.LSTMCell(3, 4)
    x, (h, c) = torch.randn(6, *batch, 3), make_hx(cell, 6, *batch)
    expected = [cell(*a) for a in zip(x, zip(h, c, strict=True), strict=True)]
    mapped = torch.vmap(lambda x, h, c: cell(x, (h, c)))(x, h, c)
    torch.testing.assert_close(mapped, tuple(torch.stack(s) for s in zip(*expected, strict=True)))


# Parameters


@pytest.mark.parametrize("change", ["data", "assign", "functional_call", "shadow"])
def test_weights_are_read_in_each_call(change):
    cell, x, new = lstm_ext.LSTMCell(3, 4), torch.randn(2, 3), torch.randn(16, 3)
    before, theirs = cell(x)[0], to_torch(cell)
    theirs.weight_ih.data.copy_(new)
    if change == "functional_call":
        output = torch.func.functional_call(cell, {"weight_ih": new}, (x,))[0]
    else:
        if change == "data":
            cell.weight_ih.data = new
        elif change == "assign":
            cell.weight_ih = nn.Parameter(new)
        else:
            cell.__dict__["weight_ih"] = new
        output = cell(x)[0]
    assert not torch.equal(output, before)
    torch.testing.assert_close(output, theirs(x)[0])


@pytest.mark.parametrize("missing", [("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")], ids=str)
def test_a_bias_taken_away(missing):
    ours = lstm_ext.LSTMCell(3, 4)
    theirs = to_torch(ours)
    for name in missing:
        setattr(ours, name, None)
        setattr(theirs, name, None)
    x, hx = torch.randn(2, 3), make_hx(ours, 2)
    # On the CPU: torch's fused cell for GPUs has no answer to one bias.
    expected = values_and_gradients(copy.deepcopy(theirs).cpu(), x.cpu(), tuple(s.cpu() for s in hx))
    torch.testing.assert_close(values_and_gradients(ours, x, hx), moved(expected, x.device))
