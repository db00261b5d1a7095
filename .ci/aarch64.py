"""Builds the wheel for aarch64 and runs `info` and the self-test of it here, under an emulator: `make aarch64`.

It needs what COMMANDS lists, and says what is missing. Below build/ it makes a small Debian, and a folder with torch
and what that imports. CUDA's libraries are among it: pip finds no torch of these versions for aarch64 without CUDA.
That is a download of 3 GB, once. It shows that the numbers are right, and nothing about speed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "aarch64"
# Each command, and the package of Debian that has it.
COMMANDS = {
    "qemu-aarch64": "qemu-user",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "debootstrap": "debootstrap",
    "dpkg-deb": "dpkg",
    "python3.13": "python3.13-dev",
}
DEBIAN, PYTHON = "trixie", "3.13"  # the Python of that Debian
TORCH = "2.13"
# torch's libraries come as wheels for many versions of glibc, and pip takes only those that are named.
PLATFORMS = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 40)]


def run(*command: str) -> None:
    print("+", shlex.join(command[:6]), "..." if len(command) > 6 else "", flush=True)
    subprocess.run(command, check=True)


def make_root(root: Path) -> None:
    """A Debian of which nothing is installed, only unpacked: Python and the libraries that torch needs."""
    packages = "--include=python3,libgomp1,libstdc++6"
    run("debootstrap", "--foreign", "--variant=minbase", "--arch=arm64", packages, DEBIAN, str(root))
    for package in (root / "var" / "cache" / "apt" / "archives").glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(root)], check=True)


def make_site(site: Path) -> None:
    options = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *PLATFORMS]
    abis = [f"--abi={abi}" for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none")]
    wanted = [f"torch=={TORCH}.*", "numpy", "setuptools>=77"]
    python = [sys.executable, "-m", "pip", "install", "-q", "--no-cache-dir", "--target", str(site)]
    run(*python, *options, *abis, "--platform=manylinux2014_aarch64", *wanted)


def made(folder: Path, make) -> Path:
    """A folder that is complete or absent."""
    if not folder.is_dir():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return folder


def main() -> int:
    missing = [
        f"{command} (apt install {name})" for command, name in COMMANDS.items() if not shutil.which(command)
    ]
    if missing:
        sys.exit(f"error: missing: {', '.join(missing)}.")
    WORK.mkdir(parents=True, exist_ok=True)
    root, site = made(WORK / "root", make_root), made(WORK / "site", make_site)
    build = [sys.executable, str(ROOT / ".ci" / "wheel.py"), "--machine", "aarch64"]
    run(*build, "--torch", TORCH, "--python", f"python{PYTHON}")

    package = WORK / "package"
    shutil.rmtree(package, ignore_errors=True)
    (wheel,) = (ROOT / "dist").glob("*_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(package)
    libraries = [str(path) for path in site.glob("nvidia/*/lib")]
    environment = {
        "PYTHONHOME": str(root / "usr"),
        "PYTHONPATH": os.pathsep.join([str(package), str(site)]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "XDG_CACHE_HOME": str(WORK / "cache"),
        "OMP_NUM_THREADS": "2",
        "LSTM_EXT_BACKEND": "aot",
    }
    emulated = ["qemu-aarch64", "-cpu", "max", "-L", str(root)]
    for name, value in environment.items():
        emulated += ["-E", f"{name}={value}"]
    for module in ("lstm_ext.info", "lstm_ext.selftest"):
        start = time.monotonic()
        command = [*emulated, str(root / "usr" / "bin" / f"python{PYTHON}"), "-m", module]
        code = subprocess.run(command, cwd=WORK).returncode  # in the checkout, its lstm_ext/ would come first
        print(f"{module}: exit code {code}, {time.monotonic() - start:.0f} s", flush=True)
        if code != 0:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
