"""lstm_ext.LSTMCell beside torch.nn.LSTMCell."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from devices import moved
from judge import assert_as_accurate_as_torch, relative_error, stacked, torch_dtypes
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing._internal.common_modules import module_db

import lstm_ext
from lstm_ext.layer import route
from lstm_ext.native import loader

pytestmark = pytest.mark.devices("cpu", "cuda")

zeros = torch.zeros


def error_of(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except Exception as error:
            return type(error), str(error)
    return None


def to_torch(cell):
    """By hand: revert has tests of its own."""
    theirs = nn.LSTMCell(
        cell.input_size, cell.hidden_size, cell.bias is not False, dtype=cell.weight_ih.dtype
    )
    theirs.load_state_dict(cell.state_dict())
    return theirs


def make_hx(cell, *batch):
    return tuple(torch.randn(*batch, cell.hidden_size, dtype=cell.weight_ih.dtype) for _ in range(2))


# Construction


@pytest.mark.devices("cpu")
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        ((3, 4), {}),
        ((3, 4, False), {}),
        ((3, 4, True, "cpu", torch.float64), {}),
        ((1, 1), {"bias": True, "dtype": torch.bfloat16}),
        ((), {"input_size": 3, "hidden_size": 5}),
        ((0, 4), {}),
        ((3, 4, None), {}),
    ],
    ids=str,
)
def test_same_module_from_the_same_seed(args, kwargs):
    torch.manual_seed(5)
    theirs = nn.LSTMCell(*args, **kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    ours = lstm_ext.LSTMCell(*args, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert repr(ours) == repr(theirs)
    assert list(ours._parameters) == list(theirs._parameters)
    assert {k: v for k, v in vars(ours).items() if k != "_parameters"} == {
        k: v for k, v in vars(theirs).items() if k != "_parameters"
    }
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    ours.reset_parameters()
    theirs.reset_parameters()
    assert not any(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True) if a.numel()
    )


def test_meta_and_to_empty(device):
    cell = lstm_ext.LSTMCell(3, 4, device="meta")
    h, c = cell(zeros(2, 3, device="meta"))
    assert h.shape == c.shape == (2, 4)
    assert h.is_meta
    cell = cell.to_empty(device=device)
    torch.manual_seed(5)
    cell.reset_parameters()
    torch.manual_seed(5)
    theirs = nn.LSTMCell(3, 4)
    x = torch.randn(2, 3)
    torch.testing.assert_close(cell(x), theirs(x))


# Values and gradients


def values_and_gradients(cell, x, hx, seed=1, dtype=None, grad_of=("h", "c")):
    if dtype is not None:
        cell, x = copy.deepcopy(cell).to(dtype), x.to(dtype)
        hx = None if hx is None else tuple(s.to(dtype) for s in hx)
    leaves = {"input": x.detach().clone().requires_grad_()}
    if hx is not None:
        leaves |= {f"hx[{i}]": s.detach().clone().requires_grad_() for i, s in enumerate(hx)}
    h, c = cell(leaves["input"], None if hx is None else (leaves["hx[0]"], leaves["hx[1]"]))
    leaves |= dict(cell.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    values = {"h": h, "c": c}
    grads = {
        name: torch.randn(v.shape, generator=generator, device="cpu").to(v) for name, v in values.items()
    }
    gradients = torch.autograd.grad(
        [values[name] for name in grad_of],
        list(leaves.values()),
        [grads[name] for name in grad_of],
        allow_unused=True,
        materialize_grads=True,
    )
    result = {name: v.detach() for name, v in values.items()}
    return result | {f"grad of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_cell_as_accurate_as_torch(cell, arguments, grad_of=("h", "c")):
    """``arguments`` is a list of (x, hx), judged together."""
    theirs = to_torch(cell)
    assert_as_accurate_as_torch(
        stacked([values_and_gradients(cell, *a, grad_of=grad_of) for a in arguments]),
        stacked([values_and_gradients(theirs, *a, grad_of=grad_of) for a in arguments]),
        stacked([values_and_gradients(theirs, *a, dtype=torch.float64, grad_of=grad_of) for a in arguments]),
    )


@pytest.mark.parametrize("grad_of", [("h", "c"), ("h",), ("c",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [False, True], ids=["no state", "state"])
@pytest.mark.parametrize("batch", [(), (1,), (5,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(bias, batch, state, dtype, grad_of):
    cell = lstm_ext.LSTMCell(17, 9, bias, dtype=dtype)
    arguments = [
        (torch.randn(*batch, 17, dtype=dtype), make_hx(cell, *batch) if state else None) for _ in range(4)
    ]
    assert_cell_as_accurate_as_torch(cell, arguments, grad_of)


(INFO,) = [info for info in module_db if info.module_cls is nn.LSTMCell]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_own_test_inputs(dtype, device):
    inputs = INFO.module_inputs_func(INFO, device=device, dtype=dtype, requires_grad=True, training=True)
    assert len(inputs) >= 2
    for given in inputs:
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        cell = lstm_ext.LSTMCell(*args, **kwargs, dtype=dtype)
        x, hx = (*given.forward_input.args, given.forward_input.kwargs.get("hx"))[:2]
        assert_cell_as_accurate_as_torch(cell, [(x, hx)] * 2)
        expected = given.reference_fn(cell, *given.forward_input.args)
        torch.testing.assert_close(cell(x, hx), tuple(expected))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_gradcheck(bias, batch):
    cell = lstm_ext.LSTMCell(2, 3, bias, dtype=torch.float64)
    x = torch.randn(*batch, 2, dtype=torch.float64, requires_grad=True)
    hx = [s.requires_grad_() for s in make_hx(cell, *batch)]
    inputs = (x, *hx, *cell.parameters())
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, h, c, *_: cell(x, (h, c)), inputs)
        assert check(lambda x, *_: cell(x), (x, *cell.parameters()))


def test_steps_are_those_of_the_layer():
    layer = lstm_ext.LSTM(3, 4)
    cell = lstm_ext.LSTMCell(3, 4)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in layer.state_dict().items()})
    x = torch.randn(6, 2, 3)
    state, layer_state = None, None
    for t in range(6):
        state = cell(x[t], state)
        _, layer_state = layer.step(x[t], layer_state)
        assert torch.equal(state[0], layer_state[0][0])
        assert torch.equal(state[1], layer_state[1][0])
    torch.testing.assert_close(state[0], layer(x)[0][-1])


def test_gradients_through_time():
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


@pytest.mark.parametrize("grad", [True, False])
def test_kernels_are_called(monkeypatch, grad):
    calls = []
    extension = loader.extension()

    class Recorder:
        def __getattr__(self, name):
            calls.append(name)
            return getattr(extension, name)

    monkeypatch.setattr(route.loader, "extension", lambda: Recorder())
    cell = lstm_ext.LSTMCell(3, 4).requires_grad_(grad)
    h, _ = cell(torch.randn(2, 3))
    assert calls == ["lstm_cell_module"]
    if grad:
        assert "LSTMLayer" in h.grad_fn.name()
        h.sum().backward()
        assert cell.weight_ih.grad is not None


# Errors


def cells():
    return lstm_ext.LSTMCell(3, 4), nn.LSTMCell(3, 4)


def test_errors_where_ours_is_in_torchs_place(monkeypatch):
    monkeypatch.setattr(nn, "LSTMCell", lstm_ext.LSTMCell)
    with pytest.raises(RuntimeError, match="input has inconsistent input_size"):
        nn.LSTMCell(3, 4)(torch.zeros(2, 5))


def test_a_trace_has_torchs_cell():
    cell, x = lstm_ext.LSTMCell(3, 4), torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(cell, x)
    assert "lstm_ext::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), cell(x))


# Autocast, compilation, transforms


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
            ours, theirs = (error_of(lambda m=m, bad=bad: m(bad)) for m in cells())
            assert ours is not None
            assert ours == theirs
    assert all(p.grad.dtype == torch.float32 for p in cell.parameters())
    assert cell.weight_hh.grad.any()


def test_compile_and_export():
    cell = lstm_ext.LSTMCell(3, 4)
    x, hx = torch.randn(2, 3), make_hx(cell, 2)
    compiled = torch.compile(cell, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, hx), cell(x, hx))
    torch.testing.assert_close(compiled(x[0], None), cell(x[0]))
    batch = torch.export.Dim("batch")
    program = torch.export.export(cell, (x, hx), dynamic_shapes=({0: batch}, ({0: batch}, {0: batch})))
    x, hx = torch.randn(5, 3), make_hx(cell, 5)
    torch.testing.assert_close(program.module()(x, hx), cell(x, hx))


def test_transforms():
    cell = lstm_ext.LSTMCell(3, 4)
    x, (h, c) = torch.randn(6, 2, 3), make_hx(cell, 6, 2)
    expected = [cell(*a) for a in zip(x, zip(h, c, strict=True), strict=True)]
    mapped = torch.vmap(lambda x, h, c: cell(x, (h, c)))(x, h, c)
    torch.testing.assert_close(mapped, tuple(torch.stack(s) for s in zip(*expected, strict=True)))

    cells = [lstm_ext.LSTMCell(3, 4) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(cells)

    def call(parameters, x):
        return torch.func.functional_call(cell, parameters, (x,))[0]

    outputs = torch.vmap(call, (0, None))(parameters, x[0])
    torch.testing.assert_close(outputs, torch.stack([m(x[0])[0] for m in cells]))
    _, tangent = torch.func.jvp(lambda x: cell(x)[0], (x[0],), (torch.ones_like(x[0]),))
    step = 1e-3
    numeric = (cell(x[0] + step)[0] - cell(x[0] - step)[0]) / (2 * step)
    torch.testing.assert_close(tangent, numeric, rtol=1e-2, atol=1e-3)


# Parameters


@pytest.mark.parametrize("change", ["data", "assign", "functional_call", "shadow", "parametrize", "norm"])
def test_weights_are_read_in_each_call(change):
    cell, x = lstm_ext.LSTMCell(3, 4), torch.randn(2, 3)
    before = cell(x)[0]
    new = torch.randn(16, 3)
    theirs = to_torch(cell)
    theirs.weight_ih.data.copy_(new)
    if change == "functional_call":
        output = torch.func.functional_call(cell, {"weight_ih": new}, (x,))[0]
    else:
        if change == "data":
            cell.weight_ih.data = new
        elif change == "assign":
            cell.weight_ih = nn.Parameter(new)
        elif change == "shadow":
            cell.__dict__["weight_ih"] = new
        elif change == "parametrize":
            parametrizations.weight_norm(cell, "weight_ih")
            cell.weight_ih = new
        else:
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(cell, "weight_ih")
            cell.weight_ih_v.data.copy_(new)
            cell.weight_ih_g.data.copy_(new.norm(dim=1, keepdim=True))
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


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_both_ways(bias):
    ours, theirs = lstm_ext.LSTMCell(3, 4, bias), nn.LSTMCell(3, 4, bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours.load_state_dict(torch.load(file, weights_only=True), strict=True)
    x = torch.randn(2, 3)
    torch.testing.assert_close(ours(x), theirs(x))
    meta = nn.LSTMCell(3, 4, bias, device="meta")
    meta.load_state_dict(ours.state_dict(), strict=True, assign=True)
    assert torch.equal(meta(x)[0], theirs(x)[0])


def test_copies():
    cell, x = lstm_ext.LSTMCell(3, 4), torch.randn(2, 3)
    file = io.BytesIO()
    torch.save(cell, file)
    file.seek(0)
    clones = [
        copy.deepcopy(cell),
        pickle.loads(pickle.dumps(cell)),
        torch.load(file, weights_only=False),
    ]
    for clone in clones:
        assert torch.equal(clone(x)[0], cell(x)[0])
        clone.weight_hh.data.zero_()
        clone.weight_ih.data.zero_()
        assert not torch.equal(clone(x)[0], cell(x)[0])
