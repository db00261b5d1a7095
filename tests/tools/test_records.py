"""The one rule for figures: from a record, the newest of each machine, none left out, and marked where it is old."""

from __future__ import annotations

import copy
import datetime
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.tools

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NEWEST = "suite_epyc_zen5_2_cores.json"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = [f"report.{name}" for name in ("ages", "pages", "quotes", "readme", "uses")]
    names += ["bench", "records", "renew"]
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in names})


def record(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


@pytest.mark.parametrize(
    ("date", "version", "why"),
    [
        ("2029-06-03", "0.2.0", ""),
        ("2029-06-02", "0.2.0", "old: 12 months"),
        ("2030-06-01", "0.1.0", "old: 2 releases before this one"),
        ("2030-06-01", "0.9.0", "old: of 0.9.0, no release"),
    ],
)
def test_what_is_old(modules, monkeypatch: pytest.MonkeyPatch, date: str, version: str, why: str) -> None:
    monkeypatch.setattr(modules.ages, "today", lambda: datetime.date(2030, 6, 2))
    monkeypatch.setattr(modules.ages, "releases", lambda: ["0.3.0", "0.2.0", "0.1.0"])
    assert modules.ages.age({"date": f"{date}T00:00:00+00:00", "lstm_ext": version}) == why


def test_a_page_without_the_mark_differs(modules, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What `report --check` says in a year: each block that has a date."""
    from lstm_ext.native import config

    assert modules.ages.releases()[0] == config.VERSION.partition(".dev")[0]
    assert modules.pages.main(["--check"]) == 0
    monkeypatch.setattr(modules.ages, "today", lambda: datetime.date(2027, 12, 1))
    assert modules.pages.main(["--check"]) == 1
    differ = capsys.readouterr().out
    dated = [block for block in modules.pages.BLOCKS if block.name not in ("faster", "not-faster", "gpu")]
    assert [block.name for block in dated if f"{block.page}: {block.name}\n" not in differ] == []


def test_the_newest_record_of_each_machine_counts(modules) -> None:
    """And no machine is left out: one that is slower than all others shows, in its column and among the slower ones."""
    quick, suite = record("cpu_epyc_zen5_2_cores.json"), record(NEWEST)
    records = {"cpu_epyc_zen5_2_cores.json": quick, NEWEST: suite}
    (machine,) = modules.uses.machines(records)
    assert len(machine.uses["training"]) == 106 and set(machine.files) == {NEWEST}
    quick["facts"]["date"] = "2027-01-01T00:00:00+00:00"
    (machine,) = modules.uses.machines(records)
    assert len(machine.uses["training"]) == 16 and set(machine.files) == set(records)

    slow = copy.deepcopy(suite)
    for result in slow["results"]:
        result["sides"].get("ours", {})["median"] = 1e9
    records = {NEWEST: suite, "suite_epyc_zen9_2_cores.json": slow}
    assert "| training, H ≥ 256, B > 1 | 0.00 to 1.09 (0.00) |" in modules.readme.faster(records)
    assert "| AVX-512, EPYC Zen 9 |" in modules.readme.by_processor(records)
    assert "AVX-512, EPYC Zen 9: 106 of 106, worst 0.00" in modules.readme.not_faster(records)

    block = next(block for block in modules.pages.BLOCKS if block.name == "uses")
    kinds = ("suite_", "cpu_", "contract_", "torchrl_")
    names = {path.name for path in RESULTS.glob("*.json") if path.name.startswith(kinds)}
    assert set(modules.pages.record_of(block)) == names


def test_measured_ratios_stand_in_generated_blocks(modules, tmp_path: Path) -> None:
    quotes = modules.quotes
    assert quotes.unexplained() == quotes.gone() == []
    text = (
        "Training is 1.59 times as fast, 0.97 times at\nworst.\n<!-- x:begin -->\n9 times\n<!-- x:end -->\n"
    )
    (tmp_path / "README.md").write_text(text)
    assert [line.split(":")[0] for line in quotes.unexplained(tmp_path, [])] == ["README.md"] * 2
    known = quotes.Quote("README.md", "1.59 times as fast, 0.97 times at worst", "a test")
    assert quotes.unexplained(tmp_path, [known]) == quotes.gone(tmp_path, [known]) == []
    assert quotes.gone(tmp_path, [known._replace(text="2 times")]) == ["README.md: 2 times"]


# ---- make records


def test_what_is_due(modules, capsys) -> None:
    """A list of all records, with whether they are older than the code and can be measured here."""
    assert modules.renew.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert all(f"| {path.stem} |" in said for path in RESULTS.glob("*_cores.json"))


def test_every_record_can_be_made_again(modules) -> None:
    for entry in modules.renew.entries():
        found = modules.records.read(entry.path)
        options = modules.bench.parse_options(modules.renew.command_of(entry.record)[1:])
        # Each case of it is a case of the suite.
        cases = {(c.group, c.name, c.dtype, c.threads, c.training) for c in options.cases}
        assert {modules.records.key(r) for r in found["results"]} <= cases, entry.path
        assert found["summary"] == modules.records.summary(found["results"]), entry.path
