"""Everything that a machine with a GPU is for, in two commands of five minutes each: `make gpu-check`, then
`make gpu-bench`.

    python3 benchmarks/gpu_check.py values|speed [--output results/NAME.json] [--budget SECONDS] [--skip PHASE ...]
                                                 [--dry]
    python3 benchmarks/gpu_check.py --accept results/NAME.json

Needs no network and no virtual environment; takes the torch that this Python has. Phases, each in processes of its own,
so that a crash or a hang of one leaves the others. First whether the kernels are right,

    build       the extension, in place; one that is there and fits is kept. Its time does not count. Without nvcc the
                program ends here
    info        the card and the versions; the kernels are loaded and run on this card
    diagnosis   tests/cuda/cuda_diagnosis.py, each kernel and dtype in a process of its own: what is wrong, and where
    selftest    python -m lstm_ext.selftest
    checks      tests/cuda/cuda_checks.py: streams, graphs, determinism, races, memory
    suite       the cases of tests/matrix on the card, each dtype in a process of its own

then how fast they are:

    benchmark   bench_gpu.py against cuDNN, at least 60 cases by estimate
    audit       bench_gpu.py --audit: what `auto` chose with an empty cache, beside each kernel and torch's layer
    sanitizer   compute-sanitizer on every kernel, where it is installed

One JSON file holds the outcome of each; it is rewritten after every phase, and the second command adds to that of the
first. Beside it an archive has it and the output of everything: that is the file to send. The exit code is 1 if a phase
failed that says whether the layer is right; what there was no time for is "incomplete" or "not run". ``--dry`` tries
out this program on the CPU: tiny shapes, nothing built, the kernels on the emulator with one planted mistake after the
other, and what needs a GPU is listed as not run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_session import ROOT, Outcome, Session, judged, version_of

LATE = "the time was up before it began"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
# Else some of torch's own products refuse to run under use_deterministic_algorithms. Not for the benchmark.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


# ---- build

# What a build would be made of, and what is there.
FITS = """import json, torch  # does it fit?
from lstm_ext.native import config
record = config.read_record(config.PACKAGE)
wants_cuda = torch.version.cuda is not None
problem = None
if record is None:
    problem = "none is there"
elif record["torch"] != torch.__version__:
    problem = f"it was built for torch {record['torch']}, this is {torch.__version__}"
elif record.get("sources") != config.digest(config.source_dir()):
    problem = "the sources have changed"
elif wants_cuda and not record.get("cuda"):
    problem = "it has no CUDA kernels"
else:
    from lstm_ext.native import loader
    try:
        loader.extension()
    except ImportError as error:
        problem = str(error)
no_toolkit = None
if problem is not None and wants_cuda:
    try:
        config.find_cuda(torch.version.cuda)
    except config.BuildError as error:
        no_toolkit = str(error)
print(json.dumps({"problem": problem, "record": record, "no_toolkit": no_toolkit}))
"""


def existing_extension(session: Session) -> dict[str, Any]:
    run = session.python("build_fits", ["-c", FITS], 60)
    return run.last_json() or {"problem": f"asking for it: {run}", "output": run.tail}


def build(session: Session, seconds: float) -> Outcome:
    found = existing_extension(session)
    if found["problem"] is None:
        return Outcome("passed", "the extension that is there fits", found)
    if session.dry:
        return Outcome("not run", f"dry; the extension that is there: {found['problem']}", found)
    if found.get("no_toolkit"):
        return Outcome("failed", found["no_toolkit"], {**found, "stop": True})
    jobs = str(len(os.sched_getaffinity(0)))
    run = session.python("build", ["setup.py", "build_ext", "--inplace"], seconds - 60, MAX_JOBS=jobs)
    outcome = judged(run, before=found, ninja=shutil.which("ninja") or version_of("ninja"))
    if run.code is None:
        outcome.reason += "; what was compiled is kept: call it again"
        outcome.details["stop"] = True
    if outcome.result == "passed":
        found = existing_extension(session)
        outcome.details["after"] = found
        if found["problem"] is not None:
            return Outcome("failed", f"built, but {found['problem']}", outcome.details)
    return outcome


# ---- info

KERNELS = """import torch  # do the kernels run?
from lstm_ext.layer import cuda_kernels
from lstm_ext.native import loader
assert loader.extension() is not None, loader.status()
assert torch.cuda.is_available(), "torch finds no GPU"
assert cuda_kernels.problem(0) is None, cuda_kernels.problem(0)
import lstm_ext
layer = lstm_ext.LSTM(3, 4, device="cuda")
output, _ = layer(torch.randn(5, 2, 3, device="cuda"))
output.sum().backward()
torch.cuda.synchronize()
assert layer.weight_hh_l0.grad.isfinite().all()
print("the kernels run")
"""


def info(session: Session, seconds: float) -> Outcome:
    bench = session.root / "benchmarks" / "bench_gpu.py"
    deadline = time.monotonic() + seconds
    run = session.python("facts", [bench, "--facts", "--device", session.device], seconds)
    if facts := run.last_json():
        session.know(facts)
    about = session.python("info", ["-m", "lstm_ext.info"], deadline - time.monotonic())
    details = {"info": about.tail.splitlines(), "facts": str(run)}
    if session.dry:
        return judged(about, **details)
    # One kernel that needs no check: a warning of the check is not about whether this card runs kernels.
    arguments = ["-W", "error::RuntimeWarning", "-c", KERNELS]
    left = deadline - time.monotonic()
    kernels = session.python("kernels", arguments, left, LSTM_EXT_CUDA_KERNEL="stepwise")
    session.gpu_works = kernels.code == 0
    outcome = judged(about if session.gpu_works else kernels, **details)
    if not session.gpu_works:
        outcome.reason = f"the kernels do not run here: {outcome.reason}"
    elif session.exclusive:
        outcome.reason = outcome.reason or "the card is in exclusive mode: one process at a time"
    return outcome


# ---- diagnosis


def diagnosis(session: Session, seconds: float) -> Outcome:
    """What each variant of a kernel gets wrong. Dry: of one, with each planted mistake, which it has to report."""
    program = session.root / "tests" / "cuda" / "cuda_diagnosis.py"
    sys.path.insert(0, str(program.parent))
    import cuda_diagnosis

    deadline = time.monotonic() + seconds
    arguments = [sys.executable, program, "--device", session.device]
    if session.dry:
        plain: list[tuple[str, list[str]]] = [
            ("persistent bfloat16", ["--kernel", "persistent", "--dtype", "bfloat16"])
        ]
        runs = plain + [(f"{plain[0][0]}, {f}", [*plain[0][1], "--fault", f]) for f in cuda_diagnosis.FAULTS]
    else:
        runs = [(f"{k} {d}", ["--kernel", k, "--dtype", d]) for k, d in cuda_diagnosis.variants()]

    def run(name: str, options: Sequence[str]) -> dict[str, Any]:
        if time.monotonic() > deadline:
            return {"variant": name, "end": LATE, "report": None}
        child = session.start(f"diagnosis_{name.replace(' ', '_').replace(',', '')}", [*arguments, *options])
        # A hang leaves time for the others. The first one may compile the emulated kernels.
        compiles = session.dry and name == runs[0][0]
        patience = 8.0 if options[-1] == "hang" else seconds * 0.7 if compiles else seconds / 4
        finished = child.wait(min(deadline, time.monotonic() + patience))
        report = finished.last_json()
        report = report if isinstance(report, dict) else None
        return {"variant": name, "end": str(finished), "report": report} | (
            {} if report else {"output": finished.tail}
        )

    found = [run(*runs[0])]
    with ThreadPoolExecutor(session.at_once(2)) as pool:
        found += pool.map(lambda one: run(*one), runs[1:])
    right = [one for one in found if one["end"] == "exit code 0"]
    details = {"variants": found}
    if session.dry:
        silent = [one["variant"] for one in found[1:] if one in right]
        if found[0] not in right or silent:
            return Outcome("failed", f"not right: {found[0]['end']}; not reported: {silent}", details)
        return Outcome("passed", f"{len(found) - 1} planted mistakes reported", details)
    late = [one["variant"] for one in found if one["end"].startswith("the time was up")]
    wrong = [one["variant"] for one in found if one not in right and one["variant"] not in late]
    reason = f"{len(right)} of {len(found)} variants are right"
    for said, names in (("wrong", wrong), ("not finished", late)):
        reason += f"; {said}: {', '.join(names)}" if names else ""
    return Outcome("failed" if wrong else "incomplete" if late else "passed", reason, details)


# ---- selftest


def selftest(session: Session, seconds: float) -> Outcome:
    if not (session.root / "lstm_ext" / "selftest.py").exists():
        return Outcome("not run", "there is no lstm_ext.selftest")
    if session.dry:
        return Outcome("not run", "dry")
    run = session.python("selftest", ["-m", "lstm_ext.selftest", "--device", "cuda"], seconds)
    lines = run.text.splitlines()
    found = session.python("variants", ["-c", VARIANTS], 30).last_json()
    failed = [line for line in lines if line.startswith("FAILED")]
    return judged(run, summary=lines[-1:], failed=failed, variants=found)


VARIANTS = """import json, torch
from lstm_ext.native import config, selftest_record
entry = selftest_record.find(torch.device("cuda", torch.cuda.current_device())) or {}
found = {name: entry.get(name) for name in ("capability", "passed", "failed")}
print(json.dumps({**found, "kernels": config.digest(config.source_dir() / "cuda")}))
"""


def accept(path: Path) -> str:
    """Puts a committed result into the release: on every card of its compute capability, `auto` then takes the kernels
    that have been right there, without a check of its own. Raises ValueError."""
    record = json.loads(path.read_text())
    phases = {phase["phase"]: phase for phase in record["phases"]}
    if record.get("dry") or record.get("verdict") != "passed":
        raise ValueError(f"{path}: expected a result of a GPU that passed, got {record.get('verdict')}")
    for name in NEEDED:
        if name not in phases:
            raise ValueError(f"{path}: the phase {name} is missing: `make gpu-check` has it")
        if phases[name]["result"] != "passed":
            raise ValueError(f"{path}: the phase {name} was {phases[name]['result']}")
    found = phases["selftest"].get("variants") or {}
    if not found.get("passed"):
        raise ValueError(f"{path}: it does not say which kernels passed")
    path = path.resolve()
    name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    from lstm_ext.native import selftest_record

    selftest_record.commit(
        found["capability"], found["kernels"], found["passed"], found["failed"] or [], name
    )
    return f"{selftest_record.COMMITTED.name}: {', '.join(found['passed'])} on {found['capability']}"


# ---- suite


def suite(session: Session, seconds: float) -> Outcome:
    """One route of the matrix, each dtype in a process of its own: an illegal access leaves nothing that works."""
    if session.record["packages"]["pytest"] is None:
        return Outcome("failed", "pytest is not installed")
    groups = {name: f"numbers_on_a_gpu and {name}" for name in ("bfloat16", "float32", "float64")}
    groups["float16"] = "numbers_on_a_gpu and float16 and not bfloat16"
    if session.dry:
        groups = {"dry": "way_to_a_device"}
    deadline = time.monotonic() + seconds
    options = ["-q", "-rfE", "--device", session.device, "--tb=short", "-p", "no:cacheprovider"]
    options += ["--rootdir", str(session.root), "-c", str(session.root / "pyproject.toml")]
    options += ["-o", "faulthandler_timeout=60"]  # so that it shows where one hangs
    options += [str(session.root / "tests" / "matrix" / "test_matrix.py"), "-k"]

    def run(name: str) -> dict[str, Any]:
        if time.monotonic() > deadline:
            return {"tests": name, "end": LATE}
        arguments = [sys.executable, "-m", "pytest", *options, groups[name]]
        finished = session.start(f"suite_{name}", arguments, **DETERMINISTIC).wait(deadline)
        counts = {
            kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", finished.tail)
        }
        failed = re.findall(r"^(?:FAILED|ERROR) (.*)", finished.text, re.MULTILINE)
        result = {"tests": name, "end": str(finished), "counts": counts, "failed": failed}
        return result if finished.code == 0 else result | {"output": finished.tail}

    with ThreadPoolExecutor(session.at_once(4)) as pool:
        ends = list(pool.map(run, groups))
    count: Counter[str] = Counter()
    for end in ends:
        count.update(end.get("counts", {}))
    late = [end for end in ends if end["end"].startswith("the time was up")]
    failed = [name for end in ends for name in end.get("failed", ())]
    good = all(end["end"] == "exit code 0" or end in late for end in ends) and not failed
    return Outcome(
        "failed" if not good else "incomplete" if late else "passed",
        ", ".join(f"{number} {kind}" for kind, number in count.items()),
        {"failed": failed, "groups": ends},
    )


# ---- checks

PATIENCE = 60.0  # seconds without a word


def checks(session: Session, seconds: float) -> Outcome:
    """One process does them all; if it dies or hangs, another one does the rest."""
    program = session.root / "tests" / "cuda" / "cuda_checks.py"
    listing = session.python("checks_list", [program, "--list"], 60)
    to_do: list[str] = listing.last_json() or []
    if listing.code != 0 or not to_do:
        verdict = "incomplete" if listing.code is None else "failed"
        return Outcome(verdict, f"the checks cannot be listed: {listing}", {"output": listing.tail})
    results: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + seconds
    quick = ["--quick"] if session.dry else []
    while to_do and time.monotonic() < deadline:
        arguments = [program, "--device", session.device, *quick, *to_do]
        # A hang leaves time for the others.
        child = session.start(f"checks{len(results)}", [sys.executable, "-u", *arguments], **DETERMINISTIC)
        run = child.wait(deadline, min(PATIENCE, seconds / 3))
        started = None
        for line in run.text.splitlines():
            try:
                said = json.loads(line)
            except ValueError:
                continue
            if not isinstance(said, dict) or "check" not in said:
                continue
            if said["result"] == "started":
                started = said["check"]
            else:
                results[said["check"]] = said
                started = None
        if started is not None:
            # A wait within a kernel has a bound: who says nothing is slow.
            verdict = "incomplete" if run.code is None else "failed"
            results[started] = {"check": started, "result": verdict, "reason": str(run), "output": run.tail}
        elif not any(name in results for name in to_do):
            if run.code is None:
                break
            return Outcome("failed", f"no check was started: {run}", {"output": run.tail})
        to_do = [name for name in to_do if name not in results]
    for name in to_do:
        results[name] = {"check": name, "result": "incomplete", "reason": LATE}
    kinds = ("passed", "failed", "not run", "incomplete")
    count = {kind: sum(r["result"] == kind for r in results.values()) for kind in kinds}
    reason = ", ".join(f"{number} {kind}" for kind, number in count.items() if number)
    verdict = next((kind for kind in ("failed", "incomplete") if count[kind]), "passed")
    return Outcome(verdict, reason, {"checks": list(results.values())})


# ---- sanitizer


def sanitizer(session: Session, seconds: float) -> Outcome:
    script = [session.root / "tests" / "cuda" / "cuda_checks.py", "--device", session.device, "sanitized"]
    if session.dry:
        run = session.python("sanitized", script, seconds)
        return judged(run) if run.code else Outcome("not run", "dry; the program that it would watch runs")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [f"{home}/{folder}" for home in filter(None, homes) for folder in ("bin", "compute-sanitizer")]
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))
    if program is None:
        return Outcome("not run", "compute-sanitizer was not found")
    deadline = time.monotonic() + seconds
    rest = ["--error-exitcode", "99", "--target-processes", "all", sys.executable, *script]
    # So that each tensor has memory of its own, with ends to run past.
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def watch(tool: str) -> dict[str, str]:
        if time.monotonic() > deadline:
            return {"tool": tool, "result": "not run", "end": LATE}
        run = session.start(f"sanitizer_{tool}", [program, "--tool", tool, *rest], **apart).wait(deadline)
        lines = run.text.splitlines()
        # Some that cannot watch a process end with 0 and report no errors, and it has never run.
        if run.code is None:
            result = "incomplete"
        elif '"began"' not in lines:
            result = "not run"
        else:
            result = "passed" if run.code == 0 and '"done"' in lines else "failed"
        said = {"tool": tool, "result": result, "end": str(run)}
        return said | {"output": run.tail[-300:] if result == "passed" else run.tail}

    with ThreadPoolExecutor(session.at_once(len(SANITIZER_TOOLS))) as pool:
        runs = list(pool.map(watch, SANITIZER_TOOLS))
    reason = ", ".join(f"{run['tool']}: {run['result']} ({run['end']})" for run in runs)
    found = {run["result"] for run in runs}
    result = "failed" if "failed" in found else found.pop() if len(found) == 1 else "incomplete"
    return Outcome(result, reason, {"tools": runs})


# ---- benchmark


def measured(session: Session, name: str, seconds: float, *more: str, **environment: str) -> Outcome:
    """What bench_gpu.py found, in the details; its file is the record's entry of this name."""
    path = session.logs / f"{name}.json"
    path.unlink(missing_ok=True)
    budget = max(1.0, seconds - 20)  # the case that runs when it is spent is finished
    options = ["--device", session.device, "--budget", f"{budget:.0f}", *(["--tiny"] if session.dry else [])]
    bench = session.root / "benchmarks" / "bench_gpu.py"
    run = session.python(name, [bench, *options, *more, "--output", path], seconds, **environment)
    if not path.exists():
        return Outcome("incomplete" if run.code is None else "failed", str(run), {"output": run.tail})
    found = session.record[name] = json.loads(path.read_text())
    results, left_out = found["results"], found["left_out"]
    errors = [f"{named(r)}: {r['error']}" for r in results if "error" in r]
    details = {"results": len(results), "left_out": len(left_out), "errors": errors}
    details |= {"too_large": found["too_large"]}
    if run.code is None or left_out:
        return Outcome("incomplete", f"{len(results)} results; the time was up", details)
    if run.code != 0:
        return Outcome("failed", str(run), {**details, "output": run.tail})
    return Outcome("passed", f"{len(results)} results", details)


def named(result: dict[str, Any]) -> str:
    return f"{result['group']} {result['case']} {result['dtype']} {result['kind']}"


def benchmark(session: Session, seconds: float) -> Outcome:
    outcome = measured(session, "benchmark", seconds)
    results = (session.record["benchmark"] or {"results": []})["results"]
    apart = [f"{named(r)}: {r['differences']['ours']:.1e}" for r in results if not r.get("agree", True)]
    outcome.details["disagree"] = apart
    return outcome


WORTH = 1.1  # so many times the fastest way is what `auto` may take: it has measured, and prefers torch's within 5 %


def audit(session: Session, seconds: float) -> Outcome:
    """With an empty cache, as a user's first process has it."""
    cache = session.logs / "audit_cache"
    shutil.rmtree(cache, ignore_errors=True)
    outcome = measured(session, "audit", seconds, "--audit", XDG_CACHE_HOME=str(cache))
    shutil.rmtree(cache, ignore_errors=True)
    results = (session.record["audit"] or {"results": []})["results"]
    slow = [
        f"{named(r)}: {r['auto_to_fastest']:.2f} times {r['fastest']}"
        for r in results
        if r.get("auto_to_fastest", 0) > WORTH
    ]
    outcome.details["failed"] = slow
    if slow and not session.dry:
        outcome.result = "failed"
        outcome.reason += f"; `auto` took a slower way in {len(slow)}"
    return outcome


PHASES: dict[str, Callable[[Session, float], Outcome]] = {
    "build": build,
    "info": info,
    "diagnosis": diagnosis,
    "selftest": selftest,
    "checks": checks,
    "suite": suite,
    "benchmark": benchmark,
    "audit": audit,
    "sanitizer": sanitizer,
}
BUDGET = 300  # seconds of a command, without the build
# With the seconds that a phase may take at most.
COMMANDS: dict[str, dict[str, int]] = {
    "values": {"build": 270, "info": 30, "diagnosis": 60, "selftest": 30, "checks": 100, "suite": 80},
    "speed": {"build": 270, "info": 30, "benchmark": 150, "audit": 50, "sanitizer": 70},
}
CORRECTNESS = [name for name in PHASES if name not in ("benchmark", "audit")]
NEEDED = ("diagnosis", "selftest", "checks", "suite")  # to have shown that a card's kernels are right


def perform(name: str, session: Session) -> dict[str, Any]:
    start = time.monotonic()
    phase, limit = PHASES[name], COMMANDS[session.command][name]
    seconds = limit if name == "build" else min(limit, session.left())
    if session.dry and name == "diagnosis":
        seconds = session.left()  # the emulated kernels may have to be compiled
    if seconds < 1:
        outcome = Outcome("not run", LATE)
    elif not session.gpu_works and name not in ("build", "info"):
        outcome = Outcome("not run", "the kernels do not run here")
    else:
        try:
            outcome = phase(session, seconds)
        except Exception as error:  # of this program itself: the other phases go on
            text = "".join(traceback.format_exception(error))
            outcome = Outcome("failed", f"{type(error).__name__}: {error}", {"traceback": text[-3000:]})
    spent = round(time.monotonic() - start, 1)
    if name == "build":
        session.deadline += spent
    said = {"phase": name, "result": outcome.result, "reason": outcome.reason, "seconds": spent}
    return said | outcome.details


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="values")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "local_gpu_check.json"
    )
    parser.add_argument(
        "--budget", type=float, default=float(BUDGET), help=f"seconds for everything but the build ({BUDGET})"
    )
    parser.add_argument(
        "--skip", nargs="+", choices=PHASES, default=[], metavar="PHASE", help=", ".join(PHASES)
    )
    parser.add_argument("--commit", help="what to say of the commit, where there is no git")
    parser.add_argument("--dry", action="store_true", help="try this program out, on the CPU")
    parser.add_argument(
        "--accept",
        type=Path,
        metavar="RESULT",
        help="put a result that passed into the release, and do nothing else",
    )
    options = parser.parse_args(arguments)
    if options.accept:
        try:
            print(accept(options.accept))
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--accept: {error}")
        return 0
    session = Session(options)
    session.write()
    for name in COMMANDS[options.command]:
        if name in options.skip:
            phase = {"phase": name, "result": "not run", "reason": "--skip", "seconds": 0.0}
        else:
            print(f"{name} ...", flush=True)
            phase = perform(name, session)
        session.add(phase)
        session.write()
        print(f"{name}: {phase['result']} ({phase['seconds']} s) {phase['reason']}", flush=True)
        if phase.get("stop"):
            session.record |= {"verdict": phase["result"], "failed": [name]}
            session.write()
            return int(phase["result"] == "failed")
        if phase["result"] == "failed":
            failures = json.dumps(phase.get("failed") or phase.get("variants") or "", indent=1)[:3000]
            print(phase.get("output") or phase.get("traceback") or failures)
    phases = session.record["phases"]
    failed = [p["phase"] for p in phases if p["result"] == "failed" and p["phase"] in CORRECTNESS]
    late = [p["phase"] for p in phases if p["result"] == "incomplete" or p["reason"] == LATE]
    late = [name for name in late if name in ("info", *NEEDED)]
    if not (session.gpu_works or failed or late):
        failed = ["info"]
    verdict = "failed" if failed else "incomplete" if late else "passed"
    seconds = round(options.budget - session.left(), 1)
    session.record |= {"verdict": verdict, "failed": failed, "seconds": seconds}
    session.write()
    report(session)
    names = ", ".join(failed or late)
    print(f"{verdict}{': ' + names if names else ''}; written to {session.output}")
    print(f"all of it, to send: {session.archive()}")
    return int(bool(failed))


def report(session: Session) -> None:
    """The table. Nothing that the verdict depends on."""
    if session.record["benchmark"] is not None:
        arguments = [session.root / "benchmarks" / "report", "gpu", "--record", session.output]
        print(session.python("report", arguments, 60).text.partition("\n")[2])


if __name__ == "__main__":
    sys.exit(main())
