"""The results of ``python -m lstm_ext.selftest``, of first uses and of measurements, for this user: a JSON file in the
cache folder.

An entry belongs to one device and one state of everything that the result depends on. If any of it changes, e.g. the
driver, the entry no longer counts.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import re
import threading
import warnings
from pathlib import Path

import torch

from . import config, loader
from .trust import distrust, make_folder, resolved

KEY = ("device", "capability", "driver", "torch", "lstm_ext", "sources")


def path() -> Path:
    """Raises RuntimeError if there is no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "lstm_ext" / "selftest.json"


def key_of(device: torch.device) -> dict[str, str]:
    """The state for which a result is valid. Reading it starts CUDA if the device is a CUDA device."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, capability = properties.name, f"{properties.major}.{properties.minor}"
        driver = _driver()
    else:
        module = loader.extension()
        name, driver = config.processor(), ""
        capability = " ".join(module.cpu_capabilities()) if module is not None else ""
    return {
        "device": name,
        "capability": capability,
        "driver": driver,
        "torch": torch.__version__,
        "lstm_ext": config.VERSION,
        "sources": str(loader.status().sources),
    }


def find(device: torch.device) -> dict | None:
    """The entry for the present state of this device, or None."""
    key = key_of(device)
    return next((entry for entry in _entries() if _is_about(entry, key)), None)


COMMITTED = Path(__file__).with_name("cuda_results.json")


def find_committed(device: torch.device) -> dict | None:
    """The result of `make gpu-check` in this release for a card of this compute capability and the CUDA kernels of this
    build; or None."""
    sources = config.source_dir()
    if sources is None or config.digest(sources) != loader.status().sources:
        return None  # the loaded library was built from other sources
    capability, kernels = key_of(device)["capability"], config.digest(sources / "cuda")
    return next((e for e in _committed() if (e["capability"], e["kernels"]) == (capability, kernels)), None)


def _committed() -> list[dict]:
    return json.loads(COMMITTED.read_text())


def commit(capability: str, kernels: str, passed: list[str], failed: list[str], result: str) -> None:
    """Adds a result to those of the release, for `benchmarks/gpu_check.py --accept`. Raises OSError."""
    entries = [e for e in _committed() if e["capability"] != capability]
    entry = {
        "capability": capability,
        "kernels": kernels,
        "passed": passed,
        "failed": failed,
        "result": result,
    }
    entries.append(entry)
    COMMITTED.write_text(json.dumps(sorted(entries, key=lambda e: e["capability"]), indent=1) + "\n")


def write(
    device: torch.device, passed: list[str], failed: list[str], measured: dict[str, dict] | None = None
) -> None:
    """Writes an entry, which replaces an older one for the same device and state, but for what was measured.

    Raises OSError or RuntimeError, also if another user could write the file.
    """
    reason = distrust(path())
    if reason is not None:
        raise RuntimeError(f"{path()} is not written, since nobody could trust it: {reason}")
    key = key_of(device)
    before = _entries()
    entries = [entry for entry in before if not _is_about(entry, key)]
    present = next((entry for entry in before if _is_about(entry, key)), {})
    measured = {**(present.get("measured") or {}), **(measured or {})}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entries.append({**key, "passed": passed, "failed": failed, "measured": measured, "date": date})
    make_folder(path().parent)
    file = resolved(path())
    unfinished = file.with_name(f"{file.name}.{threading.get_native_id()}")  # a thread's own
    with open(
        os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w"
    ) as output:
        output.write(json.dumps(entries, indent=1) + "\n")
    unfinished.replace(file)


def add(device: torch.device, variant: str, passed: bool) -> None:
    """Adds the outcome of one more variant to the entry. Errors are those of `write`."""
    entry = find(device) or {}
    good, bad = ([v for v in entry.get(name) or [] if v != variant] for name in ("passed", "failed"))
    (good if passed else bad).append(variant)
    write(device, good, bad)


def add_measured(device: torch.device, name: str, choice: dict) -> None:
    """Adds what was measured for a class of shapes. Errors are those of `write`."""
    entry = find(device) or {}
    write(device, entry.get("passed") or [], entry.get("failed") or [], {name: choice})


def _is_about(entry: dict, key: dict[str, str]) -> bool:
    return all(entry.get(name) == key[name] for name in KEY)


# Who measures knows the form of what was measured.
_FORM = [{"passed": [str], "failed": [str], "measured": {str: dict}}]


def _entries() -> list[dict]:
    try:
        file = resolved(path())
        if distrust(path()) is not None or distrust(file) is not None:  # another user may have written it
            return []
        entries = config.read_json(file, _FORM)
        if entries is None and file.exists():
            _warn_about_damage(str(file))
    except (OSError, RuntimeError):
        return []
    return entries or []


@functools.cache
def _warn_about_damage(file: str) -> None:
    warnings.warn(
        f"lstm_ext: {file} is damaged, and is not used: the next check of a device writes it anew",
        RuntimeWarning,
        stacklevel=2,
    )


def _driver() -> str:
    try:
        version = re.search(r"Module.*?\s(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        version = None
    # The fallback is the driver's version of CUDA.
    return version[1] if version else str(torch._C._cuda_getDriverVersion())
