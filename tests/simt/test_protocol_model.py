"""The model of the exchange between blocks: all its states are sound, and each planted fault is found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from simt import protocol_model
from simt.exploration import explore

pytestmark = pytest.mark.tools

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("config", protocol_model.CONFIGURATIONS, ids=str)
def test_no_fault_in_any_state(config) -> None:
    found = explore(config.model())
    assert not found.fault, found
    assert found.states > 400


@pytest.mark.parametrize("plant", protocol_model.PLANTS)
def test_planted_fault_is_found(plant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert protocol_model.main(["--plant", plant]) == 1
    *_, last_event, fault = capsys.readouterr().out.splitlines()
    assert fault.startswith("FAULT: ") and protocol_model.PLANTS[plant][1] in fault
    assert last_event.startswith("    ")


@pytest.mark.parametrize("plant", protocol_model.PLANTS)
def test_without_the_fault_there_is_none(plant: str) -> None:
    config, _ = protocol_model.PLANTS[plant]
    assert not explore(config.model()).fault


def test_from_the_command_line() -> None:
    command = [sys.executable, "-m", "simt.protocol_model"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" states, ") == len(protocol_model.CONFIGURATIONS)
    done = subprocess.run([*command, "--plant", "no memset"], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 1 and "FAULT: " in done.stdout, done.stdout + done.stderr
