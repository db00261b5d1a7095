"""One Python program in several environments: a process imports torch, for two seconds, and each has a fork of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

PARENT = """
import json, os, sys, torch
program, environments, folder = json.loads(sys.argv[1])
for i, environment in enumerate(environments):
    child = os.fork()
    if child == 0:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{i}.{name}", os.O_WRONLY | os.O_CREAT), number)
        os.environ.update(environment)
        exec(program)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def run(program: str, *environments: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
    """What the program returned and said in each environment, which is this one with some variables changed."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PARENT, json.dumps([program, environments, folder])]
        codes = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        said = [
            [Path(folder, f"{i}.{name}").read_text() for name in ("out", "err")]
            for i in range(len(environments))
        ]
        return [
            subprocess.CompletedProcess(program, int(c), *s) for c, s in zip(codes.split(), said, strict=True)
        ]
