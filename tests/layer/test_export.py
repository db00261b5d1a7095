"""torch.export, AOTInductor, and the example that runs a model in C++: one operator a layer, sizes that may change."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import assert_layers, operators
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import lstm_ext
import lstm_ext.info
from lstm_ext.native import loader

pytestmark = pytest.mark.tools  # takes long

T, B, I, H = 5, 3, 2, 4
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "aoti_inference"

batch, time, rows = Dim("batch"), Dim("time"), Dim("rows")
both_ways = pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()


def assert_equal(result, expected) -> None:
    result, expected = tree_leaves(result), tree_leaves(expected)
    assert len(result) == len(expected) > 0
    for x, y in zip(result, expected, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


class Model(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, I)
        self.lstm = lstm_ext.LSTM(I, H, num_layers=2, batch_first=True, **options)
        size = (options.get("proj_size") or H) * (2 if options.get("bidirectional") else 1)
        self.out = nn.Linear(size, 7)

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None):
        y, hx = self.lstm(self.embedding(x), hx)
        return self.out(y), hx


def states(module: lstm_ext.LSTM, *batch: int) -> tuple[Tensor, Tensor]:
    sets = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    return torch.randn(sets, *batch, sizes[0]), torch.randn(sets, *batch, sizes[1])


@both_ways
@pytest.mark.parametrize("has_hx", [False, True], ids=["no_hx", "hx"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 3, "bias": False}], ids=str)
def test_sizes_that_change(options: dict, has_hx: bool, strict: bool) -> None:
    model = Model(**options).eval()

    def arguments(batch: int, time: int) -> tuple:
        return torch.randint(7, (batch, time)), states(model.lstm, batch) if has_hx else None

    shapes = ({0: batch, 1: time}, ({1: batch}, {1: batch}) if has_hx else None)
    program = torch.export.export(model, arguments(B, T), dynamic_shapes=shapes, strict=strict)
    for p in (program, saved_and_loaded(program), program.run_decompositions()):
        assert_layers(p.graph, 2)
        for sizes in ((4, 9), (1, 1), (2, 30)):
            args = arguments(*sizes)
            (output, hx), (expected, expected_hx) = p.module()(*args), model(*args)
            assert_equal(hx, expected_hx)
            torch.testing.assert_close(output, expected)  # of a linear layer, which is decomposed


class WithOptions(nn.Module):
    """All options of a call as inputs of the graph."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, 2, bidirectional=True, **options)

    def forward(self, x: Tensor, lengths: Tensor, resets: Tensor, h: Tensor, c: Tensor):
        return self.lstm(x, lengths=lengths, resets=resets, reset_state=(h, c), return_gates=True)

    def arguments(self, time: int, batch: int) -> tuple[Tensor, ...]:
        lengths, resets = torch.randint(0, time + 1, (batch,)), torch.rand(time, batch) < 0.3
        return torch.randn(time, batch, I), lengths, resets, *states(self.lstm, batch)


@both_ways
@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "zoneout": (0.1, 0.2)}], ids=str)
def test_options_and_sizes_that_change(options: dict, strict: bool) -> None:
    model = WithOptions(**options).eval()
    shapes = ({0: time, 1: batch}, {0: batch}, {0: time, 1: batch}, {1: batch}, {1: batch})
    program = torch.export.export(model, model.arguments(T, B), dynamic_shapes=shapes, strict=strict)
    for p in (program, program.run_decompositions()):
        assert_layers(p.graph, 2)
        for sizes in ((4, 9), (1, 1), (30, 2)):
            args = model.arguments(*sizes)
            results, expected = [
                [t for t in tree_leaves(f(*args)) if t is not None] for f in (p.module(), model)
            ]
            assert_equal(results, expected)


def test_what_does_not_change_is_checked() -> None:
    module = lstm_ext.LSTM(I, H)
    program = torch.export.export(module, (torch.randn(T, B, I),), dynamic_shapes=({0: time, 1: batch},))
    run = program.module()
    with pytest.raises(AssertionError, match=r"Guard failed|expected"):
        run(torch.randn(T, B, I + 1))
    with pytest.raises(RuntimeError, match="0 time steps"):
        run(torch.randn(0, B, I))


class Step(nn.Module):
    def __init__(self, lstm: lstm_ext.LSTM) -> None:
        super().__init__()
        self.lstm = lstm

    def forward(self, x: Tensor, h: Tensor, c: Tensor):
        y, (h, c) = self.lstm.step(x, (h, c))
        return y, h, c


@both_ways
def test_step_and_cell(strict: bool) -> None:
    step = Step(lstm_ext.LSTM(I, H, 2))
    args = (torch.randn(B, I), *states(step.lstm, B))
    program = torch.export.export(
        step, args, dynamic_shapes=({0: batch}, {1: batch}, {1: batch}), strict=strict
    )
    assert_layers(program.graph, 2)
    args = (torch.randn(6, I), *states(step.lstm, 6))
    assert_equal(program.module()(*args), step(*args))

    cell = lstm_ext.LSTMCell(I, H)
    program = torch.export.export(
        cell,
        (torch.randn(B, I), (torch.randn(B, H), torch.randn(B, H))),
        dynamic_shapes=({0: batch}, ({0: batch}, {0: batch})),
        strict=strict,
    )
    assert_layers(program.graph, 1)
    args = (torch.randn(6, I), (torch.randn(6, H), torch.randn(6, H)))
    assert_equal(program.module()(*args), cell(*args))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = lstm_ext.LSTM(I, H, 2, bidirectional=True)

    def forward(self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None = None):
        output, hx = self.lstm(PackedSequence(*packed), hx)
        return output.data, hx


@both_ways
@pytest.mark.parametrize("has_hx", [False, True], ids=["no_hx", "hx"])
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["unsorted", "sorted"])
def test_packed(enforce_sorted: bool, has_hx: bool, strict: bool) -> None:
    model = Packed()

    def arguments(*lengths: int) -> tuple:
        x = torch.randn(max(lengths), len(lengths), I)
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
        return tuple(packed), states(model.lstm, len(lengths)) if has_hx else None

    indices = None if enforce_sorted else {0: batch}
    shapes = (({0: rows}, {0: time}, indices, indices), ({1: batch}, {1: batch}) if has_hx else None)
    program = torch.export.export(model, arguments(5, 4, 2), dynamic_shapes=shapes, strict=strict)
    assert_layers(program.graph, 2)
    args = arguments(7, 3, 3, 1)
    assert_equal(program.module()(*args), model(*args))


def test_training_program() -> None:
    model = Model(dropout=0.5)
    args = (torch.randint(7, (B, T)),)
    program = torch.export.export(model, args, dynamic_shapes=({0: batch, 1: time},))
    assert_layers(program.graph, 2)
    trained = program.module()
    args = (torch.randint(7, (4, 9)),)
    gradients = []
    for module in (trained, model):
        torch.manual_seed(1)
        output, (h_n, _) = module(*args)
        gradients.append(torch.autograd.grad(output.sin().sum() + h_n.sum(), list(module.parameters())))
    assert_equal(*gradients)
    assert_layers(program.run_decompositions().graph, 2)


def test_autocast() -> None:
    module, x = lstm_ext.LSTM(I, H), torch.randn(T, B, I)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = torch.export.export(module, (x,), dynamic_shapes=({0: time, 1: batch},))
        expected = module(x[:3])
    assert_layers(program.graph, 1)
    assert_equal(program.module()(x[:3]), expected)


def test_vmap_takes_the_reference() -> None:
    """torch.export has no place for the rules of vmap."""
    module = lstm_ext.LSTM(I, H)

    class Samples(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(lambda x: module(x)[0])(x)

    x = torch.randn(2, T, B, I)
    program = torch.export.export(Samples(), (x,), strict=False)
    assert operators(program.graph)["aten.sigmoid"] == 3 * T
    torch.testing.assert_close(program.module()(x), Samples()(x))


def test_loading_a_program_needs_the_operators_only() -> None:
    """As a user does it: a process that has not called a layer."""
    file = io.BytesIO()
    x = torch.randn(T, B, I)
    module = lstm_ext.LSTM(I, H)
    torch.export.save(torch.export.export(module, (x,)), file)
    program = (
        "import io, sys, torch, lstm_ext.ops\n"
        "file = io.BytesIO(sys.stdin.buffer.read())\n"
        "module = torch.export.load(file).module()\n"
        "print(module(torch.ones(5, 3, 2))[0].sum().item())\n"
    )
    run = subprocess.run([sys.executable, "-c", program], input=file.getvalue(), capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert float(run.stdout) == pytest.approx(module(torch.ones(5, 3, 2))[0].sum().item())


def test_where_the_operators_are(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "lstm_ext.info"]
    run = subprocess.run([*command, "--operators"], capture_output=True, text=True)
    assert (run.returncode, run.stdout.rstrip()) == (0, lstm_ext.info.operators_library())
    assert Path(run.stdout.rstrip()).is_file()
    run = subprocess.run([*command, "--operator"], capture_output=True, text=True)
    assert run.returncode == 2 and "expected no argument or --operators, got --operator" in run.stderr

    nothing = loader._Result(None, loader.Status("reference", reason="none was built"))
    monkeypatch.setattr(loader, "_result", nothing)
    with pytest.raises(ImportError, match="there is no compiled extension: none was built"):
        lstm_ext.info.operators_library()


def test_example_in_cpp(tmp_path: Path) -> None:
    """Builds and runs examples/aoti_inference by its Makefile, and loads the package into Python as well."""
    paths = [str(Path(lstm_ext.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = subprocess.run(
        ["make", "-j2", "-C", str(EXAMPLE), f"PYTHON={sys.executable}", f"OUT={tmp_path}"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    difference = re.search(r"^scores \[3, 10, 5\], largest difference from Python: (\S+)$", run.stdout, re.M)
    assert difference is not None and float(difference[1]) < 1e-5

    spec = importlib.util.spec_from_file_location("aoti_export", EXAMPLE / "export.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    torch.manual_seed(0)
    model = example.Policy().eval()
    package = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    for sizes in ((1, 1), (4, 7)):
        args = example.arguments(*sizes)
        torch.testing.assert_close(package(*args), model(*args))

    # The program fails where it should: another model's results, and no operators.
    x, h, c, scores, h_n, c_n = torch.load(tmp_path / "sample.pt")
    torch.save([x, h, c, scores + 1e-3, h_n, c_n], tmp_path / "wrong.pt")
    main, operators = tmp_path / "main", lstm_ext.info.operators_library()
    run = subprocess.run(
        [main, tmp_path / "model.pt2", tmp_path / "wrong.pt", operators], capture_output=True
    )
    assert run.returncode == 1
    run = subprocess.run(
        [main, tmp_path / "model.pt2", tmp_path / "sample.pt", "nowhere.so"], capture_output=True
    )
    assert run.returncode == 2 and b"nowhere.so" in run.stderr


# A T that only the data tell


CUTS = {
    "a number": lambda x, n: x[: n.item()],
    "narrow": lambda x, n: x.narrow(0, 0, n.item()),
    "a mask": lambda x, n: x[torch.arange(x.size(0)) < n],
    "a mask of rows": lambda x, n: x[:, torch.arange(x.size(1)) < n],
    "unbatched": lambda x, n: x[:, 0][torch.arange(x.size(0)) < n],
}


class Cut(nn.Module):
    def __init__(self, cut, call=None, **options) -> None:
        super().__init__()
        self.lstm, self.cut, self.call = lstm_ext.LSTM(I, H, **options).eval(), cut, call

    def forward(self, x: Tensor, n: Tensor):
        x = self.cut(x, n)
        return self.lstm(x) if self.call is None else self.call(self.lstm, x)


def by_function(lstm: lstm_ext.LSTM, x: Tensor):
    return lstm_ext.functional.lstm(x, None, list(lstm.parameters()), True, 1, 0.0, False, False, False)


@pytest.fixture
def data_dependent_sizes():
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        yield


DATA_DEPENDENT = {
    **{name: (lambda cut=cut: Cut(cut)) for name, cut in CUTS.items()},
    "stacked": lambda: Cut(CUTS["a mask"], num_layers=2, bidirectional=True, proj_size=2),
    "options": lambda: Cut(CUTS["a mask"], layer_norm=True, zoneout=0.1),
    "lengths": lambda: Cut(CUTS["a mask"], lambda lstm, x: lstm(x, lengths=torch.tensor([1, 1, 0]))),
    "function": lambda: Cut(CUTS["a mask"], by_function),
}


@pytest.mark.parametrize("make", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT)
def test_a_time_that_only_the_data_tell_compiles(make, data_dependent_sizes):
    model, x = make(), torch.randn(T, B, I)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for n in (2, 3, 1):
        assert_equal(compiled(x, torch.tensor(n)), model(x, torch.tensor(n)))


@both_ways
@pytest.mark.parametrize("make", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT)
def test_a_time_that_only_the_data_tell_exports(make, strict):
    model, x = make(), torch.randn(T, B, I)
    program = torch.export.export(model, (x, torch.tensor(2)), strict=strict)
    assert_layers(program.graph, model.lstm.num_layers)
    for n in (2, 3, 1):
        assert_equal(program.module()(x, torch.tensor(n)), model(x, torch.tensor(n)))


def test_no_step_at_all_is_an_error_when_it_runs(data_dependent_sizes):
    model, x = Cut(CUTS["a mask"]), torch.randn(T, B, I)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x, torch.tensor(2))
    program = torch.export.export(model, (x, torch.tensor(2)))
    for run in (compiled, program.module()):
        with pytest.raises(RuntimeError, match="input has 0 time steps, expected at least 1"):
            run(x, torch.tensor(0))
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        model(x, torch.tensor(0))
