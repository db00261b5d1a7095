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
FIELDS = {"group", "case", "threads", "dtype", "training", "unit", "sides"}
NEWEST, HELD = "suite_epyc_zen5_2_cores.json", "suite_epyc_zen5_avx2_2_cores.json"
OTHER = "cpu_epyc_zen3_2_cores.json"  # of another machine


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = [f"report.{name}" for name in ("ages", "pages", "quotes", "readme", "uses")] + [
        "records",
        "renew",
    ]
    return SimpleNamespace(**{name.split(".")[-1]: importlib.import_module(name) for name in names})


def record(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def facts(date: str, version: str) -> dict:
    return {"date": f"{date}T00:00:00+00:00", "lstm_ext": version, "torch": "2.13.0", "git_commit": "abc"}


# ---- age


@pytest.mark.parametrize(
    ("date", "version", "why"),
    [
        ("2030-06-02", "0.3.0.dev0", ""),
        ("2029-06-03", "0.2.0", ""),
        ("2029-06-02", "0.2.0", "old: 12 months"),
        ("2030-06-01", "0.1.0", "old: 2 releases before this one"),
        ("2030-06-01", "0.9.0", "old: of 0.9.0, no release"),
    ],
)
def test_what_is_old(modules, monkeypatch: pytest.MonkeyPatch, date: str, version: str, why: str) -> None:
    monkeypatch.setattr(modules.ages, "today", lambda: datetime.date(2030, 6, 2))
    monkeypatch.setattr(modules.ages, "releases", lambda: ["0.3.0", "0.2.0", "0.1.0"])
    assert modules.ages.age(facts(date, version)) == why
    assert modules.ages.dated(facts(date, version)) == date + (f" (**{why}**)" if why else "")


def test_the_changelog_has_this_version(modules) -> None:
    from lstm_ext.native import config

    assert modules.ages.releases()[0] == config.VERSION.partition(".dev")[0]


def test_the_day_is_that_of_the_last_commit(modules, monkeypatch: pytest.MonkeyPatch) -> None:
    assert modules.ages.today() <= datetime.date.today()
    monkeypatch.setenv("PATH", "")
    assert modules.ages.today() == datetime.date.today()


def test_a_page_without_the_mark_differs(modules, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """What `report --check` says in a year: each block that has a date."""
    assert modules.pages.main(["--check"]) == 0
    monkeypatch.setattr(modules.ages, "today", lambda: datetime.date(2027, 12, 1))
    assert modules.pages.main(["--check"]) == 1
    differ = capsys.readouterr().out
    undated = ("not-faster", "gpu")
    dated = [block for block in modules.pages.BLOCKS if block.name not in undated]
    assert [block.name for block in dated if f"{block.page}: {block.name}\n" not in differ] == []


# ---- the newest of each machine, and all of them


def test_no_machine_is_left_out(modules) -> None:
    """A machine that is slower than all others shows, in its column and in the list of what is slower."""
    records = {NEWEST: record(NEWEST)}
    before = modules.readme.faster(records)
    slow = copy.deepcopy(records[NEWEST])
    for result in slow["results"]:
        result["sides"].get("ours", {})["median"] = 1e9
    records["suite_epyc_zen9_2_cores.json"] = slow
    assert "(benchmarks/results/suite_epyc_zen9_2_cores.json) 2026-11-29 at 6fa443f" in modules.readme.faster(
        records
    )
    row = next(line for line in modules.readme.faster(records).splitlines() if line.startswith("| inference"))
    assert row.startswith("| inference, T > 1 | 0.00 to 1.59 (0.00) |") and row not in before
    assert "AVX-512, EPYC Zen9" not in modules.readme.by_processor(records)
    assert "| AVX-512, EPYC Zen 9 |" in modules.readme.by_processor(records)
    assert "inference, T > 1. AVX-512, EPYC Zen 9: 106 of 106, worst 0.00" in modules.readme.not_faster(
        records
    )


def test_the_newest_record_of_a_machine_counts(modules) -> None:
    quick, suite = record("cpu_epyc_zen5_2_cores.json"), record(NEWEST)
    records = {"cpu_epyc_zen5_2_cores.json": quick, NEWEST: suite}
    (machine,) = modules.uses.machines(records)
    assert len(machine.uses["training"]) == 106 and set(machine.files) == {NEWEST}
    quick["facts"]["date"] = "2027-01-01T00:00:00+00:00"
    (machine,) = modules.uses.machines(records)
    assert len(machine.uses["training"]) == 16 and set(machine.files) == set(records)
    assert len(machine.uses["cell"]) == 80


def test_one_step_counts_neither_as_inference_nor_as_training(modules) -> None:
    counts = {"cpu_epyc_zen5_2_cores.json": (16, 16, 2, 4), NEWEST: (106, 106, 6, 30)}
    for name, expected in counts.items():
        cases = modules.uses.cases_of(record(name))
        assert (
            tuple(len(cases[use]) for use in ("inference", "training", "step-training", "step")) == expected
        )


def test_every_record_of_a_machine_is_read(modules) -> None:
    block = next(block for block in modules.pages.BLOCKS if block.name == "uses")
    names = set(modules.pages.record_of(block))
    kinds = ("suite_", "cpu_", "contract_", "torchrl_")
    assert names == {path.name for path in RESULTS.glob("*.json") if path.name.startswith(kinds)}


def test_a_cost_is_worst_where_it_is_greatest(modules) -> None:
    memory = next(use for use in modules.uses.USES if use.key == "memory")
    (machine,) = modules.uses.machines({NEWEST: record(NEWEST)})
    assert modules.uses.worst_of(memory, machine.uses["memory"]) == max(machine.uses["memory"]) < 1


# ---- figures in prose


def test_measured_ratios_stand_in_generated_blocks(modules) -> None:
    assert modules.quotes.unexplained() == []
    assert modules.quotes.gone() == []


def test_a_ratio_in_prose_is_found(modules, tmp_path: Path) -> None:
    quotes = modules.quotes
    text = (
        "Training is 1.59 times as fast, 0.97 times at\nworst.\n<!-- x:begin -->\n9 times\n<!-- x:end -->\n"
    )
    (tmp_path / "README.md").write_text(text)
    assert [line.split(":")[0] for line in quotes.unexplained(tmp_path, [])] == ["README.md"] * 2
    known = quotes.Quote("README.md", "1.59 times as fast, 0.97 times at worst", "a test")
    assert quotes.unexplained(tmp_path, [known]) == quotes.gone(tmp_path, [known]) == []
    assert quotes.gone(tmp_path, [known._replace(text="2 times")]) == ["README.md: 2 times"]


# ---- make records


ZEN4 = "vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n"
INTEL = (
    "vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Intel(R) Xeon(R) Processor\n"
)


@pytest.mark.parametrize(
    ("cpuinfo", "capability", "name"),
    [
        (ZEN4, "avx512_bf16", "epyc_zen4"),
        (ZEN4.replace(": 17", ": 1"), "avx2", "epyc_zen3"),
        (ZEN4.replace(": 25", ": 26"), "avx512_bf16", "epyc_zen5"),
        (INTEL, "amx", "xeon_amx"),
        (INTEL, "avx512_bf16", "xeon_avx512"),
        ("CPU part\t: 0xd40\n", "neon", "arm_neon"),
    ],
)
def test_names_of_machines(modules, cpuinfo: str, capability: str, name: str) -> None:
    assert modules.renew.name_of(cpuinfo, capability) == name


class Fakes:
    """A machine, a repository and a benchmark that are none; what was started, and whether pages were renewed."""

    def __init__(self, renew, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.renew, self.started, self.renewed, self.log, self.changes = renew, [], 0, "", ""
        self.fails = False
        names = ("epyc_zen5", "epyc_zen5_avx2")
        self.machine = renew.Machine(names, "AMD EPYC", "avx512_bf16", 2)
        for name in (NEWEST, HELD, OTHER):
            (folder / name).write_text((RESULTS / name).read_text())
        self.folder = folder
        found = renew.entries
        monkeypatch.setattr(renew, "RESULTS", folder)
        monkeypatch.setattr(renew, "ROOT", folder)
        monkeypatch.setattr(renew, "entries", lambda: found(folder))
        monkeypatch.setattr(renew, "machine_here", lambda: self.machine)
        monkeypatch.setattr(renew, "git", lambda *a: self.log if a[0] == "log" else self.changes)
        monkeypatch.setattr(renew, "renew_pages", self.renew_pages)
        monkeypatch.setattr(renew, "subprocess", SimpleNamespace(run=self.run))

    def renew_pages(self) -> None:
        self.renewed += 1

    def run(self, command: list[str], env: dict[str, str]) -> SimpleNamespace:
        self.started.append((command, env))
        self.output(self.started[-1]).write_text("{}")
        return SimpleNamespace(returncode=int(self.fails))

    def output(self, started: tuple[list[str], dict[str, str]]) -> Path:
        return Path(started[0][started[0].index("--output") + 1])


@pytest.fixture
def fakes(modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fakes:
    return Fakes(modules.renew, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "log", "started", "said"),
    [
        ([], "", [], f"{NEWEST[:-5]}: newer than the code"),
        ([], "", [], "library_epyc_zen5_2_cores: there is no record of this machine"),
        ([], "1\n2", [NEWEST, HELD], "bench.py"),
        (["--force", NEWEST[:-5]], "", [NEWEST], "bench.py"),
        (["--new"], "", ["library_epyc_zen5_2_cores.json"], "--only library"),
        (["--list"], "1", [], "| epyc_zen5, 2 cores | 6fa443fa28a5 | 1 commit since | can be renewed here |"),
        (["--list"], "1", [], "| this is epyc_zen5, 2 cores |"),
    ],
)
def test_what_is_measured(fakes: Fakes, capsys, arguments, log, started, said) -> None:
    """Only what is of this machine, and older than the code or forced; the pages follow."""
    fakes.log = log
    assert fakes.renew.main(arguments) == 0
    assert said in capsys.readouterr().out
    assert [path.name for path in map(fakes.output, fakes.started)] == started
    assert all((fakes.folder / name).read_text() == "{}" for name in started)
    assert (fakes.folder / OTHER).read_text() != "{}" and fakes.renewed == bool(started)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([OTHER[:-5]], "cannot be renewed: this is epyc_zen5, 2 cores"),
        (["none"], "expected names that --list shows, got none"),
    ],
)
def test_names_that_cannot_be_measured(fakes: Fakes, capsys, names, said) -> None:
    with pytest.raises(SystemExit):
        fakes.renew.main(names)
    assert said in capsys.readouterr().err


def test_a_record_is_made_as_it_was(fakes: Fakes) -> None:
    fakes.log = "1"
    fakes.renew.main([])
    (plain, here), (held, environment) = fakes.started
    assert plain[plain.index("--budget") + 1] == "0.6" and not {"--shapes", "--only"} & set(plain)
    assert held[held.index("--only") + 1 :][:4] == ["inference", "training", "frozen", "step"]
    assert environment["LSTM_EXT_CPU_CAPABILITY"] == "avx2" != here.get("LSTM_EXT_CPU_CAPABILITY")


def test_a_new_record_is_no_change_to_the_next_benchmark(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets to its place when all have ended; those before one that fails get there too."""
    names, seen = (NEWEST, HELD), []
    fakes.log, run = "1", fakes.run

    def second_fails(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        seen.append([(fakes.folder / name).read_text() == "{}" for name in names])
        fakes.fails = len(seen) == 2
        return run(command, env)

    monkeypatch.setattr(fakes.renew, "subprocess", SimpleNamespace(run=second_fails))
    with pytest.raises(SystemExit, match=r"bench\.py failed"):
        fakes.renew.main([])
    assert seen == [[False, False], [False, False]]
    assert [(fakes.folder / name).read_text() == "{}" for name in names] == [True, False]


def test_pictures_that_no_page_shows_are_left_out(
    modules, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def draw(arguments: list[str]) -> None:
        for name in ("gains.png", "other.png") if arguments else ():
            (Path(arguments[1]) / name).write_text("new")

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "gains.png").write_text("old")
    monkeypatch.setattr(modules.renew, "ROOT", tmp_path)
    monkeypatch.setattr(modules.renew, "pages", SimpleNamespace(main=draw))
    modules.renew.renew_pages()
    assert {p.name: p.read_text() for p in (tmp_path / "docs").iterdir()} == {"gains.png": "new"}


def test_changes_that_no_commit_has(fakes: Fakes) -> None:
    fakes.changes = " M csrc/cpu/gates.h"
    with pytest.raises(SystemExit, match="expected a checkout without changes"):
        fakes.renew.main(["--force"])
    assert not fakes.started


def test_what_makes_a_record_older(modules, monkeypatch: pytest.MonkeyPatch) -> None:
    renew = modules.renew
    entry = next(entry for entry in renew.entries() if entry.path.name == NEWEST)
    asked = []
    monkeypatch.setattr(renew, "git", lambda *a: asked.append(a))
    assert renew.changes_since(entry) == "its commit is not in this checkout"
    assert asked[0][2] == "6fa443fa28a5..HEAD"
    sources = {"csrc", "lstm_ext", "benchmarks/bench.py", "benchmarks/groups.py", "benchmarks/sides.py"}
    assert sources <= set(asked[0][4:]) and not [path for path in asked[0] if "report" in path]
    changed = entry._replace(record={"facts": {"git_commit": "abc+changes"}})
    assert renew.changes_since(changed) == "measured with changes that no commit has"
    monkeypatch.setattr(renew, "git", lambda *a: "")
    assert renew.changes_since(entry) == ""


def test_git_says_nothing_of_a_commit_that_is_not_here(modules) -> None:
    assert modules.renew.git("rev-parse", "--verify", "-q", "0123456789abcdef^{commit}") is None


def test_every_record_has_the_one_format_and_can_be_made_again(modules, tmp_path: Path) -> None:
    bench = importlib.import_module("bench")
    for entry in modules.renew.entries():
        program, *arguments = modules.renew.command_of(entry.record)
        if entry.path.stem == modules.renew.SUPPORT:
            assert (ROOT / "benchmarks" / program).exists() and not arguments
            continue
        found = modules.records.read(entry.path)
        options = bench.parse_options(arguments)
        # Each case of it is a case of the suite.
        cases = {(c.group, c.name, c.dtype, c.threads, c.training) for c in options.cases}
        assert {modules.records.key(r) for r in found["results"]} <= cases, entry.path
        assert found["summary"] == modules.records.summary(found["results"]), entry.path
        assert all(set(r) >= FIELDS and r["sides"] for r in found["results"]), entry.path
    path = tmp_path / "old.json"
    for text in ('{"suite": "another"}', '{"suite": "lstm_ext bench", "format": 0}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match="expected a file that benchmarks/bench"):
            modules.records.read(path)
