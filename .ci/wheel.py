"""Builds the wheel that needs no compiler: `make wheel`.

    python .ci/wheel.py [--torch 2.11 ...] [--python python3.12 ...] [--machine aarch64]
    python .ci/wheel.py --check [...]  # `make wheel-check`: installs the wheel without a compiler, and tests it there
    python .ci/wheel.py --here [--check]  # for the torch and the Python that run this, whose files it uses
    python .ci/wheel.py --cuda [...]  # with the CUDA kernels; needs nvcc, and torches with CUDA

It has the CPU kernels once, the operators for each torch, and the Python module for each pair of a torch and a Python;
lstm_ext/native/loader.py picks them by their names. torch's headers come from its wheels, which pip downloads. Nothing
is linked with torch's libraries: empty ones with the same names stand in for them. What is compiled, and with which
flags, lstm_ext/native/config.py says, as for every other build. Needs Linux on x86-64, g++, ninja and auditwheel; for
aarch64 (--machine) also aarch64-linux-gnu-g++.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "lstm_ext" / "native"))
import config  # noqa: E402 (it imports nothing of the package)

WORK = ROOT / "build" / "wheel"
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.14t")  # t: without the GIL
TORCH_LIBRARIES = ("torch", "torch_cpu", "c10")
PLATFORM = "manylinux_2_34"
# The compiler for a machine that is not this one. Its C++ library decides which systems the wheel is for.
CROSS_COMPILERS = {"aarch64": "aarch64-linux-gnu-g++"}
# For --check. The tests left out import packages of the group `test`, or compile something.
TEST_PACKAGES = ("pytest", "pytest-xdist", "pytest-timeout", "numpy", "expecttest", "hypothesis")
LEFT_OUT = ("test_onnx_export.py", "test_torchrl.py")
TESTS = (
    *shlex.split("-q -n 2 --dist worksteal -p no:cacheprovider -W ignore"),
    *("-k", "not without_fullgraph", "-m", "not tools and not full and not pages"),  # the slow ones, too
    *("-c", str(ROOT / "pyproject.toml"), str(ROOT / "tests" / "nn"), str(ROOT / "tests" / "call")),
    *(f"--ignore={ROOT / 'tests' / 'nn' / name}" for name in LEFT_OUT),
)
SHOWN = ("extension", "cpu: ", "cuda: ")  # the lines of info and selftest that are shown
# What torch's own builds add to the flags.
FLAGS = ("-fPIC", "-DNDEBUG", "-fwrapv", "-DTORCH_API_INCLUDE_EXTENSION_H")
# Unless TORCH_CUDA_ARCH_LIST names others: code for the first of each generation runs on the others of it.
CUDA_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# Beside those of the CPU: what the glue of CUDA needs, of torch and of the toolkit.
TORCH_CUDA_LIBRARIES = ("torch_cuda", "c10_cuda")
CUDA_LIBRARIES = ("cudart", "cublas")
# In --check of a wheel with CUDA kernels, where there is neither a GPU nor nvcc.
CUDA_CHECK = """
import torch, lstm_ext
from lstm_ext.native import loader
cuda, name = loader.status().cuda, "lstm_ext::lstm_layer"
assert cuda and cuda == loader.extension().build_info()["cuda"], loader.status()
assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
said = lstm_ext.explain(lstm_ext.LSTM(64, 64), (64, 16, 64), device="H100", dtype=torch.bfloat16)
assert "persistent" in str(said), said
print("cuda:", cuda)
"""


@dataclass(frozen=True)
class Torch:
    minor: str
    version: str
    include: Path
    standard: str  # the flag for the C++ standard of its headers
    cuda: str | None  # the version of CUDA that it was built with


@dataclass(frozen=True)
class Machine:
    """The machine that a wheel is for."""

    name: str  # as in config.CPU_SETS
    compiler: str

    @property
    def tag(self) -> str:
        return f"{PLATFORM}_{self.name}" if self.name == config.machine() else "auto"

    @property
    def work(self) -> Path:
        return WORK if self.name == config.machine() else WORK.with_name(f"wheel-{self.name}")


@dataclass(frozen=True)
class Python:
    version: str
    include: Path
    suffix: str  # of its modules


def machine_of(name: str) -> Machine:
    """This machine with its compiler, or another one with its cross compiler."""
    if name == config.machine():
        return Machine(name, config.find_compiler()[0])
    compiler = CROSS_COMPILERS.get(name)
    if compiler is None or shutil.which(compiler) is None:
        sys.exit(f"error: no compiler for {name} was found: apt install g++-{name}-linux-gnu.")
    return Machine(name, compiler)


def torch_of(minor: str, machine: Machine) -> Torch:
    """The headers of the newest torch of a minor version, downloaded once."""
    folder = machine.work / f"torch-{minor}"
    if not ((folder / "version").is_file() and (folder / "torch/version.py").is_file()):
        print(f"fetching the headers of torch {minor}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=machine.work) as download:
            pip = [sys.executable, *shlex.split("-m pip download -q --no-deps --no-cache-dir -d"), download]
            # Which Python it is for does not matter: the headers are the same.
            kind = [
                "--only-binary=:all:",
                "--python-version=3.12",
                f"--platform=manylinux_2_28_{machine.name}",
            ]
            subprocess.run([*pip, *kind, f"torch=={minor}.*"], check=True)
            (archive,) = Path(download).glob("torch-*.whl")
            with zipfile.ZipFile(archive) as wheel:
                wanted = ("torch/include/", "torch/utils/cpp_extension.py", "torch/version.py")
                wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith(wanted)])
        (folder / "version").write_text(archive.name.split("-")[1])
    return torch_in(folder, (folder / "version").read_text())


def torch_in(folder: Path, version: str) -> Torch:
    """A torch whose headers lie below a folder."""
    minor = ".".join(version.split(".")[:2])
    # The standard that torch adds to flags that name none.
    text = (folder / "torch/utils/cpp_extension.py").read_text()
    standards = {f"-std={name}" for name in re.findall(r"cpp_flag_prefix \+ '(c\+\+\d\d)'", text)}
    if len(standards) != 1:
        sys.exit(
            f"error: torch {minor}: expected one C++ standard in cpp_extension.py, found {sorted(standards)}"
        )
    cuda = re.search(r"^cuda\b.*= '([\d.]+)'$", (folder / "torch/version.py").read_text(), re.MULTILINE)
    return Torch(minor, version, folder / "torch" / "include", standards.pop(), cuda[1] if cuda else None)


def torch_here() -> Torch:
    torch = importlib.metadata.distribution("torch")
    return torch_in(Path(torch.locate_file("")), torch.version)


def python_of(command: str) -> Python | None:
    """What an interpreter says of itself; None if it does not run, or has no headers."""
    ask = (
        "import sys, sysconfig as s; print('%d.%d' % sys.version_info[:2] + sys.abiflags); "
        "print(s.get_path('include')); print(s.get_config_var('EXT_SUFFIX'))"
    )
    try:
        run = subprocess.run([command, "-c", ask], capture_output=True, text=True)
    except OSError:
        return None
    if run.returncode != 0:
        return None
    version, include, suffix = run.stdout.splitlines()
    return Python(version, Path(include), suffix) if (Path(include) / "Python.h").is_file() else None


def header_folders(python: Python, machine: Machine) -> list[Path]:
    """The folders of Python.h and what it includes, which is the same on both machines.

    Debian's Python.h reads a header from a folder that is named after the machine.
    """
    own = python.include.parent / f"{config.machine()}-linux-gnu"
    if machine.name == config.machine() or not own.is_dir():
        return [python.include]
    named = machine.work / "headers" / f"{machine.name}-linux-gnu"
    named.parent.mkdir(exist_ok=True)
    named.unlink(missing_ok=True)
    named.symlink_to(own)
    return [python.include, named.parent]


class Ninja:
    """A build file."""

    def __init__(self, compiler: str) -> None:
        self.lines = [
            "rule cc",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  description = $out",
            "rule link",
            f"  command = {compiler} -shared -s -Wl,--no-as-needed $in -o $out $flags",
            "  description = $out",
        ]

    def add_nvcc(self, nvcc: Path) -> None:
        command = f"{shlex.quote(str(nvcc))} -MMD -MF $out.d $flags -c $in -o $out"
        self.lines += [
            "rule nvcc", f"  command = {command}", "  depfile = $out.d", "  description = $out",
        ]  # fmt: skip

    def step(self, rule: str, target: str, sources: list[str], flags: list[str], after: list[str]) -> str:
        implicit = f" | {' '.join(after)}" if after else ""
        text = " ".join(shlex.quote(flag).replace("$", "$$") for flag in flags)
        self.lines += [f"build {target}: {rule} {' '.join(sources)}{implicit}", f"  flags = {text}"]
        return target

    def library(
        self,
        target: str,
        sources: list[Path],
        compile_flags: list[str],
        link_flags: list[str],
        others: list[str],
        after: tuple[str, ...] | list[str] = (),
    ) -> str:
        objects = [
            self.step(
                "nvcc" if path.suffix == ".cu" else "cc",
                f"objects/{target}/{path.stem}.o", [str(path)], compile_flags, [],
            )
            for path in sources
        ]  # fmt: skip
        return self.step("link", target, [*objects, *others], link_flags, list(after))


def cuda_for(torches: list[Torch]) -> tuple[config.Cuda, list[Torch]]:
    """The toolkit, and the torches that have its version of CUDA."""
    newest = next((torch.cuda for torch in reversed(torches) if torch.cuda), None)
    if newest is None:
        sys.exit(f"error: --cuda: none of torch {', '.join(t.version for t in torches)} has CUDA.")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    try:
        cuda = config.find_cuda(newest)
    except config.BuildError as error:
        sys.exit(f"error: --cuda: {error}")
    major = cuda.version.split(".")[0]
    fitting = [torch for torch in torches if (torch.cuda or "").split(".")[0] == major]
    for torch in torches:
        if torch not in fitting:
            print(f"without CUDA kernels for torch {torch.version}: it has CUDA {torch.cuda}")
    return cuda, fitting


def compile_cuda(
    ninja: Ninja, cuda: config.Cuda, torches: list[Torch], mine: list[str], needed: dict[str, str]
) -> None:
    """The kernels once, and for each torch the library that registers them."""
    csrc, kernels = ROOT / "csrc", config.CUDA_KERNELS_LIBRARY
    sources = [path for path in config.sources(csrc, with_cuda=True) if config.needs_cuda(path)]
    codes = []
    for architecture in cuda.architectures.split(";"):
        number = architecture.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if architecture.endswith("+PTX") else ("sm",)
        codes += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    # The last word on visibility counts: the libraries of each torch call the kernels.
    nvcc = [*config.NVCC_FLAGS, *cuda.nvcc_flags, *codes, "-std=c++17", f"-I{csrc}"]
    nvcc += ["-Xcompiler=-fPIC,-fvisibility=default", "-Xfatbin=-compress-all"]
    ninja.add_nvcc(cuda.home / "bin" / "nvcc")
    of_kernels = [path for path in sources if path.suffix == ".cu"]
    ninja.library(kernels, of_kernels, nvcc, [f"-Wl,-soname,{kernels}"], [needed["cudart"]])
    glue = [path for path in sources if path not in of_kernels]
    for torch in torches:
        include = [torch.include, torch.include / "torch/csrc/api/include", cuda.home / "include"]
        flags = [*mine, *(f"-isystem{path}" for path in (*include, *cuda.header_dirs)), torch.standard]
        flags.append(f'-DLSTM_EXT_CUDA_BUILD="{cuda}"')
        library = config.cuda_library(torch.minor)
        link_flags = [f"-Wl,-soname,{library}", "-Wl,-rpath,$ORIGIN"]
        ninja.library(
            library, glue, flags, link_flags, [kernels, config.ops_library(torch.minor), *needed.values()]
        )


def compile_all(
    machine: Machine, torches: list[Torch], pythons: list[Python], out: Path, with_cuda: bool
) -> config.Cuda | None:
    ninja = Ninja(machine.compiler)
    work = machine.work
    (work / "empty.c").touch()

    def stand_in(name: str, version: str = "") -> str:
        file = f"lib{name}.so{version}"
        return ninja.step("link", f"stand_ins/{file}", ["empty.c"], [f"-Wl,-soname,{file}"], [])

    csrc = ROOT / "csrc"
    kernel_sources, operator_sources, module_sources = config.split_sources(
        csrc, False, tuple(config.CPU_SETS[machine.name]), work
    )
    mine = [*config.COMPILE_FLAGS, *FLAGS, f'-DLSTM_EXT_BUILD="{config.digest(csrc)}"', f"-I{csrc}"]
    stand_ins = {name: stand_in(name) for name in (*TORCH_LIBRARIES, "torch_python")}
    torch_libraries = [stand_ins[name] for name in TORCH_LIBRARIES]

    kernels = config.KERNELS_LIBRARY
    ninja.library(kernels, kernel_sources, [*mine, torches[-1].standard], [f"-Wl,-soname,{kernels}"], [])
    for torch in torches:
        include = torch.include
        flags = [*mine, f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}", torch.standard]
        ops = config.ops_library(torch.minor)
        ops_flags = [*flags, "-DTORCH_EXTENSION_NAME=_ops"]
        ops_link_flags = [*config.ops_link_flags(ops), "-Wl,-rpath,$ORIGIN"]
        ninja.library(ops, operator_sources, ops_flags, ops_link_flags, [kernels, *torch_libraries])
        for python in pythons:
            headers = [f"-isystem{path}" for path in header_folders(python, machine)]
            module_flags = [*flags, *headers, "-DTORCH_EXTENSION_NAME=_C"]
            needed = [kernels, *torch_libraries, stand_ins["torch_python"]]
            name = f"_C-{torch.minor}{python.suffix.replace(config.machine(), machine.name)}"
            ninja.library(name, module_sources, module_flags, config.module_link_flags(ops), needed, [ops])
    cuda = None
    if with_cuda:
        cuda, fitting = cuda_for(torches)
        major = "." + cuda.version.split(".")[0]
        needed = {name: stand_ins[name] for name in TORCH_LIBRARIES}
        needed |= {name: stand_in(name) for name in TORCH_CUDA_LIBRARIES}
        needed |= {name: stand_in(name, major) for name in CUDA_LIBRARIES}
        compile_cuda(ninja, cuda, fitting, mine, needed)
    (work / "build.ninja").write_text("\n".join(ninja.lines) + "\n")
    subprocess.run(["ninja", "-C", str(work)], check=True, env=os.environ | {"PATH": config.search_path()})

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for path in work.glob("_*.so"):
        shutil.copy(path, out)
    return cuda


def write_record(
    machine: Machine, torches: list[Torch], pythons: list[Python], out: Path, cuda: config.Cuda | None
) -> None:
    versions = {torch.minor: torch.version for torch in torches}
    said = subprocess.run(
        [*shlex.split(machine.compiler), "--version"], capture_output=True, text=True, check=True
    )
    compiler = said.stdout.splitlines()[0]
    more = {"wheel": versions, "python": ", ".join(python.version for python in pythons)}
    more["cuda"] = str(cuda) if cuda else None
    config.write_record(out, ", ".join(versions.values()), compiler, config.digest(ROOT / "csrc"), **more)


def pack(libraries: Path, base: Path, dist: Path, machine: Machine) -> None:
    """The wheel of the package and of libraries that are there, for several torches and Pythons."""
    sys.path.remove(str(Path(__file__).resolve().parent))  # setuptools has a package of the name of this file
    import setuptools
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    class CopyLibraries(build_py):
        def run(self) -> None:
            super().run()
            for path in libraries.iterdir():
                self.copy_file(str(path), str(Path(self.build_lib) / "lstm_ext" / "native" / path.name))

    class ForEveryPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    class WithLibraries(setuptools.Distribution):
        def has_ext_modules(self) -> bool:
            return True

    # A folder of its own: build/lib may hold libraries of other builds.
    command = ["-q", "build", f"--build-base={base}", "bdist_wheel", f"--dist-dir={dist}"]
    os.chdir(ROOT)
    setuptools.setup(
        script_args=[*command, f"--plat-name=linux_{machine.name}"],
        distclass=WithLibraries,
        cmdclass={"build_py": CopyLibraries, "bdist_wheel": ForEveryPython},
    )


def made(machine: str) -> Path:
    """The wheel in dist/."""
    found = sorted((ROOT / "dist").glob(f"lstm_ext-{config.VERSION}-*manylinux_2_??_{machine}.whl"))
    if not found:
        sys.exit(
            f"error: there is no wheel of lstm_ext {config.VERSION} in {ROOT / 'dist'}: run `make wheel` first."
        )
    return found[0]


def check_pair(
    wheel: Path, minor: str, command: str, here: bool, folder: Path, environment: dict[str, str]
) -> bool:
    """`here`: with the packages of this environment, and of the tests the self-test only."""
    venv = WORK / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([command, "-m", "venv", str(venv)], check=True)

    def run(*arguments: str) -> tuple[bool, list[str]]:
        process = subprocess.run(
            [str(venv / "bin" / "python"), *arguments],
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return process.returncode == 0, process.stdout.splitlines() or [""]

    install = ["-m", "pip", "install", "-q"]
    if here:
        (site,) = venv.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{torch_here().include.parents[1]}\n")
        steps = []
        install += ["--no-deps", "--ignore-installed"]  # this environment may have this version too
    else:
        steps = [run(*install, f"torch=={minor}.*", *TEST_PACKAGES)]
    start = time.monotonic()
    steps.append(run(*install, str(wheel)))
    seconds = time.monotonic() - start
    shown = "import sys, torch; print(torch.__version__, 'Python', sys.version.split()[0])"
    version = run("-c", shown)[1][-1]
    print(f"torch {version}: installed in {seconds:.1f} s")
    steps.append((version.startswith(minor + "."), [f"torch {minor} was there before, and is not now"]))
    place = run("-c", "import lstm_ext; print(lstm_ext.__file__)")[1][-1]
    steps.append(
        (place.startswith(str(venv)), [f"the package that was imported is not the wheel's: {place}"])
    )
    programs = [("-m", "lstm_ext.info"), ("-m", "lstm_ext.selftest")]
    with zipfile.ZipFile(wheel) as archive:
        has_cuda = f"lstm_ext/native/{config.cuda_library(minor)}" in archive.namelist()
    programs += [("-c", CUDA_CHECK)] if has_cuda else []
    programs += [] if here else [("-m", "pytest", *TESTS)]
    for arguments in programs:
        ok, lines = run(*arguments)
        print("  " + ("" if ok else "FAILED: ") + next((x for x in lines if x.startswith(SHOWN)), lines[-1]))
        steps.append((ok, lines))
    print("\n".join(line for ok, lines in steps if not ok for line in lines[-40:]), flush=True)
    shutil.rmtree(venv)
    return all(ok for ok, _ in steps)


def check(torches: list[str], commands: list[str], here: bool) -> int:
    """Installs the wheel for each torch, with the Pythons in turn, into a new environment, and tests it there.

    No program is on the PATH meanwhile, so no compiler. The tests are those that need no sources.
    """
    wheel = made(config.machine())
    empty = WORK / "check"
    empty.mkdir(exist_ok=True)
    # Neither a compiler nor a checkout.
    kept = ("HOME", "LANG", "PIP_", "SSL_", "http", "HTTP")
    environment = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    environment |= {
        "PATH": str(empty / "nothing"),
        "XDG_CACHE_HOME": str(empty / "cache"),
        "LSTM_EXT_BACKEND": "aot",
    }
    failed = 0
    for i, minor in enumerate(torches):
        if not check_pair(wheel, minor, commands[i % len(commands)], here, empty, environment):
            failed += 1
    print(f"{len(torches) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=config.TORCHES, choices=config.TORCHES, metavar="MINOR")
    parser.add_argument("--python", nargs="+", default=[f"python{v}" for v in PYTHONS], metavar="COMMAND")
    parser.add_argument("--machine", default=config.machine(), choices=config.CPU_SETS)
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--cuda", action="store_true", help="with the CUDA kernels")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.here:
        options.torch, options.python = [torch_here().minor], [sys.executable]
    if not config.is_supported_platform():
        sys.exit("error: the wheel is for Linux on x86-64 and aarch64, and is built there.")
    if options.check and options.machine != config.machine():
        sys.exit("error: a wheel is checked on its own machine, or under an emulator by .ci/aarch64.py.")
    if options.cuda and options.machine != config.machine():
        sys.exit("error: --cuda: nvcc compiles for this machine only.")
    machine = machine_of(options.machine)
    work = machine.work
    os.environ["PATH"] = config.search_path()
    work.mkdir(parents=True, exist_ok=True)

    asked = {command: python_of(command) for command in options.python}
    pythons = list({python.suffix: python for python in asked.values() if python is not None}.values())
    left_out = [command for command, python in asked.items() if python is None]
    if left_out:
        print(f"without {', '.join(left_out)}: not here, or without Python.h")
    if not pythons:
        sys.exit("error: none of the Pythons is here with its headers (apt install python3-dev).")
    if options.check:
        commands = [command for command, python in asked.items() if python is not None]
        return check(options.torch, commands, options.here)
    torches = [torch_here()] if options.here else [torch_of(minor, machine) for minor in options.torch]
    for path in work.glob("_*.so"):
        path.unlink()
    out = work / "libraries"
    cuda = compile_all(machine, torches, pythons, out, options.cuda)
    write_record(machine, torches, pythons, out, cuda)

    raw, base = work / "raw", work / "base"
    for folder in (raw, base):
        shutil.rmtree(folder, ignore_errors=True)
    pack(out, base, raw, machine)
    (unrepaired,) = raw.glob("*.whl")
    excluded = [
        f"--exclude=lib{name}.so" for name in (*TORCH_LIBRARIES, "torch_python", *TORCH_CUDA_LIBRARIES)
    ]
    excluded += [f"--exclude=lib{name}.so.*" for name in CUDA_LIBRARIES]
    repair = ["repair", f"--plat={machine.tag}", *excluded, "-w", str(ROOT / "dist"), str(unrepaired)]
    subprocess.run([sys.executable, "-m", "auditwheel", *repair], check=True)
    wheel = made(machine.name)
    size = wheel.stat().st_size / 1e6
    print(f"{wheel}: {size:.1f} MB, {len(torches)} torches, Python {', '.join(p.version for p in pythons)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
