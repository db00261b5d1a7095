"""The one rule for figures: from a record, the newest of each machine, none left out, and marked where it is old."""

from __future__ import annotations

import copy
import datetime
import importlib
import json
import subprocess
from collections.abc import Callable, Iterator
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
    monkeypatch.setattr(modules.ages, "of_commit", lambda commit: "")
    facts = {"date": f"{date}T00:00:00+00:00", "lstm_ext": version, "git_commit": "0"}
    assert modules.ages.age(facts) == why


@pytest.fixture
def history(modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """A checkout in the place of this one; what is returned runs git there."""

    def run(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    run("init", "-q")
    (tmp_path / "csrc").mkdir()
    monkeypatch.setattr(modules.ages, "ROOT", tmp_path)
    for function in (modules.ages.has_history, modules.ages.commits_since):
        function.cache_clear()
    yield run
    for function in (modules.ages.has_history, modules.ages.commits_since):
        function.cache_clear()


def test_what_is_old_by_its_commit(modules, history, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(modules.ages, "COMMITS", 2)
    commits = []
    for place, number in (("csrc/a", "0"), ("csrc/a", "1"), ("b", "2"), ("csrc/a", "3"), ("csrc/a", "4")):
        (tmp_path / place).write_text(number)
        history("add", ".")
        history("commit", "-qm", number)
        commits.append(history("rev-parse", "--short=12", "HEAD"))
    old = "old: more than 2 commits in csrc/ since"
    assert [modules.ages.of_commit(commit) for commit in commits] == [old, "", "", "", ""]
    dirty = "measured with changes that no commit has"
    assert modules.ages.of_commit(f"{commits[-1]}+changes") == dirty
    assert modules.ages.of_commit("0123456789ab") == "of a commit that is not here"
    assert modules.ages.of_commit(None) == "of no commit"


@pytest.mark.parametrize("kind", ["no checkout", "inside another", "shallow", "no git"])
def test_pages_keep_their_marks_without_the_history(
    modules, history, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    ages = modules.ages
    shown = f"a {ages.marked('2030-01-01', 'old: more than 90 commits in csrc/ since')} at 0"
    history("commit", "-qm", "0", "--allow-empty")
    assert ages.has_history() and ages.differs(shown, "a 2030-01-01 at 0")
    if kind == "no checkout":
        (tmp_path / ".git").rename(tmp_path / "git")
    elif kind == "inside another":
        monkeypatch.setattr(ages, "ROOT", tmp_path / "csrc")
    elif kind == "shallow":
        (tmp_path / ".git" / "shallow").write_text(f"{history('rev-parse', 'HEAD')}\n")
    else:
        monkeypatch.setenv("PATH", "")
    ages.has_history.cache_clear()
    assert not ages.has_history() and ages.of_commit("0123456789ab") == ""
    assert not ages.differs(shown, "a 2030-01-01 at 0")
    assert ages.differs(shown, "a 2030-01-02 at 0")
    assert isinstance(ages.today(), datetime.date)


def test_a_page_without_the_mark_differs(modules, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What `report --check` says in a year: each block that has a date."""
    from lstm_ext.native import config

    assert modules.ages.releases()[0] == config.VERSION.partition(".dev")[0]
    assert modules.pages.main(["--check"]) == 0
    monkeypatch.setattr(modules.ages, "today", lambda: datetime.date(2027, 12, 1))
    # Without the history of git a mark is no difference.
    monkeypatch.setattr(modules.ages, "differs", lambda shown, text: shown != text)
    assert modules.pages.main(["--check"]) == 1
    differ = capsys.readouterr().out
    dated = [block for block in modules.pages.BLOCKS if block.name not in ("slowest", "not-faster", "gpu")]
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
    said = modules.readme.not_faster(records)
    assert "AVX-512, EPYC Zen 9: 106 of 106, worst 0.00" in said
    assert "training step, T > 1, H ≥ 256, B > 1, on AVX-512, EPYC Zen 9, 0.00" in modules.readme.slowest(
        records
    )

    block = next(block for block in modules.pages.BLOCKS if block.name == "uses")
    kinds = ("suite_", "malloc_", "cpu_", "contract_", "torchrl_")
    names = {path.name for path in RESULTS.glob("*.json") if path.name.startswith(kinds)}
    assert set(modules.pages.record_of(block)) == names


def test_all_rows_are_counted(modules) -> None:
    """Costs too, where torch has the same one: an import takes longer than none."""
    suite = record(NEWEST)
    (machine,) = modules.uses.machines({NEWEST: suite})
    assert machine.uses["first"] == [
        pytest.approx(machine.uses["import"][0] + r["sides"]["ours"]["median"])
        for r in suite["results"]
        if r["group"] == "first-call"
    ]
    *rows, total = modules.uses.slower([machine])
    below, of_all = 0, 0
    for use in modules.uses.USES:
        values = [] if use.part_of else machine.over_torch(use)
        below, of_all = below + sum(value < 1 for value in values), of_all + len(values)
    assert total == f"- **All rows.** {machine.place}: {below} of {of_all}."
    assert f"{machine.place}: 4 of 4, worst" in next(row for row in rows if "first call of a process" in row)
    for result in suite["results"]:
        if result["group"] == "memory":
            result["sides"]["ours"]["median"] = 2 * result["sides"]["torch"]["median"]
    (machine,) = modules.uses.machines({NEWEST: suite})
    assert f"share of torch's. {machine.place}: 10 of 10, worst 0.50." in "\n".join(
        modules.uses.slower([machine])
    )


def test_malloc_as_it_is_stands_beside(modules) -> None:
    """In the README behind a slash, on the page as a row of its own; never in the place of the other row."""
    records = {NEWEST: record(NEWEST)}
    assert "beside it: not measured yet." in modules.readme.faster(records)
    usual = copy.deepcopy(records[NEWEST])
    usual["settings"]["usual_malloc"], usual["facts"]["freed_memory_kept"] = True, False
    usual["facts"]["date"] = "2027-01-01T00:00:00+00:00"
    usual["results"] = [r for r in usual["results"] if r["group"] == "ragged"]
    for result in usual["results"]:
        result["sides"]["torch"]["median"] = 3 * result["sides"]["ours"]["median"]
    records["malloc_epyc_zen5_2_cores.json"] = usual
    said = modules.readme.faster(records)
    assert "| ragged batches (`PackedSequence`) | 6.11 (3.34) / 3.00 (3.00) |" in said
    assert "not measured yet" not in said and "kept by `mallopt`." in said
    table = modules.readme.by_processor(records)
    assert "| ragged batches (`PackedSequence`), malloc as it is | 16 | 3.00 (3.00) |" in table
    assert "1 and 2 threads, load 1.8 at the start, malloc as it is" in table
    # It can be made, and made again.
    for arguments in (modules.renew.ARGUMENTS["malloc"], modules.renew.command_of(usual)[1:]):
        options = modules.bench.parse_options(arguments)
        assert options.usual_malloc and set(options.only) == set(modules.bench.USUAL_MALLOC)


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
