"""Random layers and arguments, right and wrong, drawn and made small by hypothesis.

A few hundred cases in each run; `make fuzz` runs 20,000 and says what they were. LSTM_EXT_FUZZ_CASES and
LSTM_EXT_FUZZ_SEED change the number and the draw. What fails is printed as a call of ``check`` or
``check_fault``.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lstm_ext

hypothesis = pytest.importorskip("hypothesis")

from fuzz_strategies import BATCHED, PACKED, UNBATCHED, cases, faulty  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from matrix.cases import _C, Case, Options  # noqa: E402
from matrix.judge import check, try_out  # noqa: E402
from matrix.judge_faults import Faulty, check_fault  # noqa: E402
from matrix.routes import NestedLSTM  # noqa: E402


def check_nested(case: Case, kind: type[nn.Module] = lstm_ext.LSTM) -> None:
    """Packed data as a nested tensor; torch's layer takes none."""
    check(case, NestedLSTM if kind is lstm_ext.LSTM else kind)


# Layouts or, of faults, entries; what to check, and its share of the cases.
CATEGORIES: dict[str, tuple[list[str], Callable[..., Any], float]] = {
    "batched": (BATCHED, check, 0.35),
    "unbatched": (UNBATCHED, check, 0.1),
    "packed": (PACKED, check, 0.25),
    "nested": (PACKED, check_nested, 0.05),
    "faults": (["layer", "function"], check_fault, 0.13),
    "faults, packed": (["packed", "nested", "equations"], check_fault, 0.07),
    "faults, others": (["step", "cell", "constructor", "cell_constructor"], check_fault, 0.05),
}
STRATEGIES = {check: cases, check_nested: cases, check_fault: faulty}
NAMES = list(CATEGORIES)

FEW = 250
MANY = int(os.environ.get("LSTM_EXT_FUZZ_CASES", "2000"))
SEED = int(os.environ.get("LSTM_EXT_FUZZ_SEED", "1"))
# Later in a run hypothesis makes most cases out of earlier ones, with one entry another: too much of the same here.
BATCH = 10
# Tests a category is cut into: after ten minutes in one of them, pytest prints where it is (pyproject.toml).
PARTS = 4
# Where to leave each case before it runs: after a crash, nobody else knows which it was.
LAST = os.environ.get("LSTM_EXT_FUZZ_LAST")

counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)


def features(case: Case) -> list[str]:
    """What a case is an instance of, for the summary."""
    T, B = max(case.lengths, default=case.steps), len(case.lengths)
    found = [case.layout, case.dtype, case.mode, case.capability, f"{case.num_layers} layers"]
    found += [name for name in ("bias", "bidirectional", "hx", "repeat_backward") if getattr(case, name)]
    found += ["projection"] * (case.proj_size > 0) + ["frozen parts"] * bool(case.frozen)
    found += ["dropout"] * (case.dropout > 0 and case.training and case.num_layers > 1)
    found += ["batch of 0"] * (B == 0) + ["batch of 1"] * (B == 1) + ["one step"] * (T == 1)
    found += ["some outputs"] * (len(case.grad_of) < len(case.results))
    if case.options:
        found += ["options", *case.options.features(case.training)]
    strides = ("input_strides", "hx_strides", "weight_strides", "grad_strides")
    found += [name for name in strides if getattr(case, name) != "dense"]
    if B and case.threads > 1 and case.dtype in ("float32", "float64"):
        plan = _C.cpu_plan(
            steps=T, batch=B, input_size=case.input_size, hidden_size=case.hidden_size,
            proj_size=case.proj_size, threads=case.threads, float64=case.dtype == "float64",
        )  # fmt: skip
        found += ["two workers, rows"] * (plan["forward_batch_groups"] > 1)
        found += ["two workers, units"] * (plan["forward_hidden_groups"] > 1)
    return found


def run(
    category: str,
    number: int,
    seed: int,
    kind: type[nn.Module] = lstm_ext.LSTM,
    part: int = 0,
) -> None:
    """At least ``number`` different cases; for torch's layer none with options. Each ``part`` draws others."""
    layouts, judge, _ = CATEGORIES[category]
    counter = counts[category]
    seen: set[Case | Faulty] = set()

    def each(case: Case | Faulty) -> None:
        if case in seen:  # the simplest one, in each batch
            return
        if LAST:
            Path(LAST).write_text(f"{judge.__name__}({case!r})\n")
        result = judge(case) if isinstance(case, Faulty) else judge(case, kind)
        seen.add(case)
        counter["cases"] += 1
        counter.update(features(case) if isinstance(case, Case) else [case.fault, f"outcome: {result}"])

    ours = issubclass(kind, lstm_ext.LSTM)
    drawn = STRATEGIES[judge](layouts) if ours else cases(layouts, with_options=False)
    decorated = settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )(given(drawn)(each))
    batch = part * 100_000
    while len(seen) < number:
        hypothesis.seed(1_000_000 * seed + batch)(decorated)()
        batch += 1


@pytest.mark.slow
@pytest.mark.parametrize("category", NAMES)
def test_a_few(category):
    run(category, int(FEW * CATEGORIES[category][2]), 0)


@pytest.fixture
def summary(request: pytest.FixtureRequest) -> Iterator[None]:
    """Printed after the last part of a category."""
    yield
    category, part = (request.node.callspec.params[name] for name in ("category", "part"))
    if part == PARTS - 1:
        counter = counts.pop(category)
        total = counter.pop("cases", 0)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{category}: {total} cases, seed {SEED}, of them")
            print("   " + ", ".join(f"{name} {n}" for name, n in counter.most_common()))


@pytest.mark.full
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("category", NAMES)
def test_many(category, part, summary):
    if part == 0:
        counts.pop(category, None)
    run(category, max(1, int(MANY * CATEGORIES[category][2] / PARTS)), SEED, part=part)


# --- the harness itself --------------------------------------------------------------------------------------------


def test_a_chaotic_case_is_tried_without_its_bound() -> None:
    """Found with seed 2: the equations and the oracle, both in float64, differed by 1e-4."""
    options = Options(layer_norm=True, cell_clip=0.05)
    case = Case(
        layout="unbatched", lengths=(18,), input_size=1, hidden_size=49, num_layers=3, bias=False,
        bidirectional=True, options=options,
    )  # fmt: skip
    trial = try_out(case, lstm_ext.LSTM)
    assert trial.case.options.cell_clip is None and max(trial.excess().values()) <= 1


@pytest.mark.tools
@pytest.mark.parametrize("category", ["batched", "packed"])
def test_torch_passes(category):
    """The bound is none that only this package keeps; and packed cases are built as torch wants them."""
    run(category, 25, 2, nn.LSTM)


@pytest.mark.tools
@pytest.mark.parametrize(("dtype", "relative"), [("float32", 1e-2), ("float64", 1e-11)])
@pytest.mark.parametrize("layout", ["batched", "handmade", "options"])
def test_one_wrong_row_is_seen(layout, dtype, relative):
    """What the bound is worth: one row of middling size a little too large, in turn for every value and gradient."""
    options = None
    if layout == "options":
        options = Options(
            lengths=(9, 9, 6, 1), resets=0.2, reset_state=True, return_cell_states=True, return_gates=True,
            zoneout=(0.1, 0.2), recurrent_dropout=0.3,
        )  # fmt: skip
    for seed in range(2 if options else 10):
        case = Case(
            "handmade" if layout == "handmade" else "batched", (9, 9, 6, 1) if layout == "handmade" else (9,) * 4,
            input_size=20 + seed, hidden_size=17 + 5 * seed, num_layers=2, bidirectional=True, proj_size=seed % 3,
            hx=True, dtype=dtype, seed=seed, options=options,
        )  # fmt: skip
        case = dataclasses.replace(case, grad_of=case.results)
        trial = try_out(case, lstm_ext.LSTM if options else nn.LSTM)
        assert max(trial.excess().values()) <= 1
        for name, value in trial.result.values.items():
            rows = value.clone().view(-1, value.size(-1)) if value.dim() > 1 else value.clone()[:, None]
            sizes = rows.norm(dim=-1)
            row = int(sizes.argsort()[-((sizes > 0).sum() + 1) // 2])  # padding is 0
            rows[row] *= 1 + relative
            trial.result.values[name] = rows.view(value.shape)
            assert trial.excess()[name] > 1, (case, name)
            trial.result.values[name] = value
