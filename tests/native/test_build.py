"""How the extension is found and built, and what a user is told when it cannot be. In processes of their own."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lstm_ext
import lstm_ext.info
from lstm_ext.native import config, jit, loader

pytestmark = pytest.mark.tools
CSRC = Path(__file__).resolve().parents[2] / "csrc"


# The smallest csrc/ that builds: without torch's headers it takes a second.
TINY_OPS = """
#ifdef BROKEN
void missing_from_torch();
#endif
extern "C" __attribute__((visibility("default"))) int tiny() {
#ifdef BROKEN
  missing_from_torch();
#endif
  return 1;
}
"""
TINY = """
#include <Python.h>
#ifdef BROKEN
void missing_from_torch();
#endif
extern "C" int tiny();
static PyObject* no(PyObject*, PyObject*) { Py_RETURN_FALSE; }
static PyMethodDef methods[] = {{"measures_workers", no, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
#ifdef BROKEN
  missing_from_torch();
#endif
  if (getenv("TINY_REFUSES")) {
    PyErr_SetString(PyExc_ImportError, "TINY_REFUSES is set");
    return nullptr;
  }
  return tiny() == 1 ? PyModule_Create(&module) : nullptr;
}
"""
SHOW = "from lstm_ext.native import loader; loader.extension(); print(loader.status().backend)"
# Runs the layer twice on whatever there is, and shows every warning.
USE = """
import warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lstm_ext
    from lstm_ext.native import loader
    torch.manual_seed(0)
    ours, theirs = lstm_ext.LSTM(3, 4), torch.nn.LSTM(3, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    for _ in range(2):
        exact = {} if loader.status().backend == "reference" else {"rtol": 0, "atol": 0}  # torch's own operator
        torch.testing.assert_close(ours(x), theirs(x), **exact)
print(len(caught))
print(*(w.message for w in caught))
"""


class Project:  # also used by test_build_cuda.py
    """A copy of the package with a tiny csrc/ and nothing built."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "lstm_ext"
        source = Path(lstm_ext.__file__).parent

        def other_than_python(folder: str, names: list[str]) -> list[str]:
            return [n for n in names if not n.endswith(".py") and not (Path(folder) / n).is_dir()]

        shutil.copytree(source, self.package, ignore=other_than_python)
        (root / "setup.py").touch()
        (root / "csrc").mkdir()
        (root / "csrc" / "python.cpp").write_text(TINY)
        (root / "csrc" / "operators.cpp").write_text(TINY_OPS)
        operators = self.package / "layer" / "operators.py"
        waits = "\nloader.on_load(register)\n"
        text = operators.read_text()
        assert waits in text
        operators.write_text(text.replace(waits, ""))  # there are no operators to register

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("LSTM_EXT_")}
        env |= {"PYTHONPATH": str(self.root), "TORCH_EXTENSIONS_DIR": str(self.root / "jit"), **environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *arguments], env=env, cwd=self.root, text=True, stdout=pipe, stderr=pipe
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        with self.start(*arguments, **environment) as process:
            out, err = process.communicate(timeout=300)
        return process.returncode, out.strip(), err.strip()

    def last_error(self, code: str, **environment: str) -> str:
        returncode, _, err = self.run("-c", code, **environment)
        assert returncode == 1
        return err.splitlines()[-1]

    def script(self, text: str) -> str:
        path = self.root.parent / "compiler"  # torch 2.11 does not take one in a folder with a space
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    def ahead_of_time(self, torch_version: str | None, content: bytes = b"", ops: bytes | None = b"") -> None:
        (self.package / "native" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(content)
        if ops is not None:
            (self.package / "native" / config.OPS_LIBRARY).write_bytes(ops)
        if torch_version is not None:
            config.write_record(self.package / "native", torch_version, "a compiler", "a digest")

    def compiled(self, name: str, link_flags: list[str], *flags: str) -> bytes:
        """A library of one of the tiny sources."""
        command, _ = config.find_compiler()
        common = [
            "-shared",
            "-fPIC",
            "-DTORCH_EXTENSION_NAME=_C",
            f"-I{sysconfig.get_path('include')}",
            *flags,
        ]
        arguments = [*common, f"csrc/{name}.cpp", *link_flags, "-o", f"{name}.so"]
        subprocess.run([command, *arguments], check=True, cwd=self.root)
        return (self.root / f"{name}.so").read_bytes()

    def wheel(self, torch_minor: str, cuda: str | None = None) -> None:
        """What a wheel has for one torch and this Python; with `cuda`, a library in place of the CUDA kernels."""
        native, ops = self.package / "native", config.ops_library(torch_minor)
        (native / ops).write_bytes(self.compiled("operators", config.ops_link_flags(ops)))
        module = self.compiled("python", config.module_link_flags("./operators.so"))
        (native / f"_C-{torch_minor}{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(module)
        versions = {torch_minor: f"{torch_minor}.9"}
        config.write_record(native, torch_minor, "g++", "0", wheel=versions, cuda=cuda)
        if cuda is not None:
            (self.root / "csrc" / "nothing.cpp").touch()
            (native / config.cuda_library(torch_minor)).write_bytes(self.compiled("nothing", []))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "with a space")


UNTESTED = "lstm_ext was tested with torch 2.11 to 2.15, and not with torch"


@pytest.mark.parametrize(
    ("version", "returncode", "said"),
    [
        (
            "2.10.0+cpu",
            1,
            "error: torch 2.10.0+cpu is installed, and lstm_ext needs 2.11 or later: `pip install",
        ),
        ("2.16.0", 0, f"warning: {UNTESTED} 2.16.0"),
        ("2.14.0.dev20260901+cpu", 0, f"warning: {UNTESTED} 2.14.0.dev20260901+cpu"),
    ],
)
def test_the_sources_with_another_torch(project: Project, version: str, returncode: int, said: str) -> None:
    """One that is too old is refused. One that is newer, or a nightly build, is tried."""
    shutil.copy(Path(__file__).parents[2] / "setup.py", project.root)
    setup = "import sys, runpy; sys.argv[1:] = ['build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    build = "import runpy; runpy.run_module('lstm_ext.build', run_name='__main__')"
    for program, words in ((setup, said), (build, said.partition(": ")[2])):
        code, _, err = project.run("-c", f"import torch; torch.__version__ = {version!r}; {program}")
        assert (code, words in err) == (returncode, True), err


@pytest.mark.parametrize(
    ("built_for", "version", "fits"),
    [
        ("2.13.0+cpu", "2.13.1+cu130", True),
        ("2.13.0", "2.13.0.post1", True),
        ("2.13.0", "2.14.0", False),
        ("2.13.0", "3.13.0", False),
        ("2.16.0", "2.16.0", True),
        ("2.14.0", "2.14.0.dev20260901", False),
        ("2.14.0.dev20260901", "2.14.0", False),
        ("2.14.0.dev20260901", "2.14.0.dev20260902", False),
        ("2.14.0.dev20260901", "2.14.0.dev20260901", True),
        ("2.14.0a0+git1", "2.14.0a0+git2", False),
        ("2.14.0rc1", "2.14.0", False),
        ("", "2.14.0", False),
    ],
)
def test_which_torch_a_library_fits(built_for: str, version: str, fits: bool) -> None:
    assert config.fits_torch(built_for, version) is fits


def test_one_openmp_runtime() -> None:
    code = """if True:
        import re, torch, lstm_ext
        with torch.no_grad():
            lstm_ext.LSTM(8, 8)(torch.randn(4, 64, 8))
        from lstm_ext.native import loader
        assert loader.extension() is not None
        print(*{line.split()[-1] for line in open("/proc/self/maps") if re.search(r"/lib(gomp|i?omp)", line)})
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(run.stdout.split()) == 1, run.stdout


def needed_by(library: Path) -> list[str]:
    run = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return re.findall(r"\(NEEDED\).*\[(.*)\]", run.stdout)


@pytest.mark.parametrize("library", ["path", "ops_path"])
def test_no_function_is_newer_than_the_systems_of_a_wheel(library: str) -> None:
    """Newer headers of glibc bind some, such as strtoll, to a symbol of their own. auditwheel refuses such a wheel."""
    wheel = (CSRC.parent / ".ci" / "wheel.py").read_text()
    platform = re.search(r'^PLATFORM = "manylinux_(\d+)_(\d+)"$', wheel, re.MULTILINE)
    file = getattr(lstm_ext.native.loader.status(), library)
    symbols = subprocess.run(
        ["readelf", "-W", "--dyn-syms", file], capture_output=True, text=True, check=True
    )
    found = re.findall(r" (\S+)@GLIBC_(\d+)\.(\d+)", symbols.stdout)
    assert found
    newest = tuple(map(int, platform.groups()))
    assert [name for name, *version in found if tuple(map(int, version)) > newest] == []


def test_build_ahead_of_time(project: Project) -> None:
    shutil.copy(Path(__file__).parents[2] / "setup.py", project.root)
    # Asked for two at a time: the second library is linked with the first, and has to wait for it.
    returncode, _, err = project.run("setup.py", "build_ext", "--inplace", "--parallel", "2")
    assert returncode == 0, err
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {path.name for path in (project.package / "native").glob("*.so")} == {
        config.OPS_LIBRARY,
        f"_C{suffix}",
    }
    assert config.OPS_LIBRARY in needed_by(project.package / "native" / f"_C{suffix}")
    assert not [
        name for name in needed_by(project.package / "native" / config.OPS_LIBRARY) if "python" in name
    ]
    assert project.run("-c", SHOW, LSTM_EXT_BACKEND="aot") == (0, "aot", "")
    assert project.run("-m", "lstm_ext.build")[1].splitlines()[-1].startswith("nothing to build: ")
    refused = project.run("-m", "lstm_ext.build", TINY_REFUSES="1")  # it fits, so there is nothing to compile
    assert (refused[0], refused[2]) == (1, "lstm_ext.build: error: TINY_REFUSES is set")
    assert not (project.root / "jit").exists()
    code = "import importlib, torch; importlib.import_module('lstm_ext.native._C')"
    assert project.run("-c", code) == (0, "", "")  # the one finds the other, wherever both lie


BUILD = "python -m lstm_ext.build"
UNCHANGED = """
import os, sys
before = dict(os.environ), set(sys.modules)
from lstm_ext.native import loader
loader.extension()
assert before[0] == dict(os.environ) and "torch.utils.cpp_extension" not in set(sys.modules) - before[1]
print(loader.status().backend)
"""


def test_nothing_is_compiled_unless_asked(project: Project) -> None:
    returncode, out, err = project.run("-c", SHOW)
    assert (returncode, out) == (0, "torch") and not (project.root / "jit").exists()
    assert f"there is no lstm_ext.native._C. `{BUILD}` compiles them" in err

    # Two at once: one builds, the other waits for it.
    processes = [project.start("-m", "lstm_ext.build"), project.start("-m", "lstm_ext.build")]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("compiling the extension, once" in err for _, err in outputs) == 1
    found = sorted(out.splitlines()[-1].partition(":")[0] for out, _ in outputs)
    assert found == ["built", "nothing to build"]
    assert sorted(
        out.count("[1/2] python.o\n") + out.count("[1/2] operators_together.o\n") for out, _ in outputs
    ) == [0, 2]
    assert project.run("-c", SHOW) == (0, "jit", "")

    # Or by a variable, in the first call, in a process of its own.
    shutil.rmtree(project.root / "jit")
    returncode, out, err = project.run("-c", UNCHANGED, LSTM_EXT_BACKEND="jit")
    assert (returncode, out) == (0, "jit"), err
    assert err.count("compiling the extension, once") == 1

    # Built once and for all: a compiler is not needed any more.
    assert project.run("-c", SHOW, CXX="no-such-compiler") == (0, "jit", "")
    (ops_library,) = (project.root / "jit").glob("*/lstm_ext_ops.so")
    assert not [name for name in needed_by(ops_library) if "python" in name]
    assert ops_library.name in needed_by(ops_library.with_name("lstm_ext_C.so"))

    # A build that was killed leaves objects, torch's lock file and no record.
    (directory,) = (path for path in (project.root / "jit").iterdir() if path.is_dir())
    (directory / config.RECORD).unlink()
    (directory / "lock").touch()
    (directory / "python.o").write_text("half an object")
    assert project.run("-c", SHOW)[1] == "torch"
    returncode, _, err = project.run("-m", "lstm_ext.build")
    assert returncode == 0 and "compiling the extension" in err
    assert project.run("-c", SHOW) == (0, "jit", "")

    # A library that is whole, and has its own reason: no rebuild.
    returncode, _, err = project.run("-c", SHOW, TINY_REFUSES="1")
    assert returncode == 1
    assert "compiling" not in err
    assert err.splitlines()[-1] == "ImportError: TINY_REFUSES is set"

    # A library that was cut short, or is gone.
    (directory / "lstm_ext_C.so").write_bytes(b"\x7fELF")
    assert project.run("-c", SHOW)[1] == "torch"
    (directory / "lstm_ext_ops.so").unlink()
    assert project.run("-m", "lstm_ext.build")[0] == 0
    assert (directory / "lstm_ext_ops.so").is_file()


@pytest.mark.parametrize(
    ("compiler", "said"),
    [
        (
            None,
            "no C++ compiler was found (looked for no-such-compiler): install one, e.g. `apt install g++`",
        ),
        ("echo segfault >&2; exit 3", "does not work (segfault)"),
        (
            "case $1 in --version) echo g++ 12;; *) echo 'x.cpp:1: error: disk full'; exit 1;; esac",
            "error: disk full",
        ),
    ],
    ids=["missing", "broken", "fails"],
)
def test_a_compiler_that_does_not_work(project: Project, compiler: str | None, said: str) -> None:
    command = "no-such-compiler" if compiler is None else project.script(compiler)
    returncode, _, err = project.run("-m", "lstm_ext.build", CXX=command)
    assert returncode == 1
    assert err.splitlines()[-1].startswith("lstm_ext.build: error: ") and said in err.splitlines()[-1]
    error = project.last_error(SHOW, CXX=command, LSTM_EXT_BACKEND="jit")
    assert error.startswith("ImportError: LSTM_EXT_BACKEND=jit, but the build failed: ") and said in error
    # A call that nobody asked to compile does not look for a compiler.
    returncode, out, err = project.run("-c", USE, CXX=command)
    assert returncode == 0, err
    count, _, message = out.partition("\n")
    assert count == "1", out
    assert BUILD in message and "\n" not in message


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ("config.search_path = lambda: ''", "pip install ninja"),
        ("config.source_dir = lambda: None", "reinstall lstm_ext"),
        ("sys.executable, sys.exec_prefix = '', '/nowhere'", "no Python interpreter was found in /nowhere"),
    ],
    ids=["ninja", "sources", "python"],
)
def test_what_is_missing_is_named(project: Project, patch: str, said: str) -> None:
    code = f"import sys; from lstm_ext.native import config; {patch}; sys.argv = ['x']; from lstm_ext import build"
    returncode, _, err = project.run("-c", f"{code}; sys.exit(build.main())")
    assert returncode == 1 and said in err.splitlines()[-1]


def test_bad_arguments_of_the_build(project: Project) -> None:
    returncode, _, err = project.run("-m", "lstm_ext.build", "--fast")
    assert (returncode, err) == (2, "lstm_ext.build: expected no arguments, got --fast")


@pytest.mark.parametrize("what", ["is_supported_platform = lambda", "runs_here = lambda cpu_set"])
def test_where_nothing_can_be_built_nothing_is_said(project: Project, what: str) -> None:
    """There torch's operator is what a user expects. Those who ask are told."""
    patch = f"from lstm_ext.native import config; config.{what}: False"
    returncode, out, err = project.run("-W", "error", "-c", f"{patch}; {SHOW}")
    assert (returncode, out) == (0, "torch"), err
    for module in ("info", "selftest"):
        main = f"import sys; sys.argv = ['x']; from lstm_ext import {module}; sys.exit({module}.main())"
        returncode, out, err = project.run("-c", f"{patch}; {main}")
        assert returncode == 1 and "Warning" not in err
        assert (
            "the extension supports Linux on x86-64 with AVX2, FMA and F16C, and on aarch64 only" in out + err
        )
    _, out, _ = project.run("-c", f"{patch}; from lstm_ext import info; info.main()")
    assert "aot        cannot be built: the extension supports Linux" in out


def test_what_is_built_is_not_loaded_where_no_set_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel on a processor without AVX2: as where nothing can be built."""
    monkeypatch.setattr(config, "runs_here", lambda cpu_set: False)
    monkeypatch.setattr(loader, "_load", lambda *_: pytest.fail("it was loaded"))
    monkeypatch.setattr(loader, "_result", None)
    monkeypatch.delenv("LSTM_EXT_BACKEND", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loader.load_built()
        assert loader.extension() is None and loader.status().backend == "torch"
    monkeypatch.setattr(loader, "_result", None)
    monkeypatch.setenv("LSTM_EXT_BACKEND", "aot")
    with pytest.raises(
        ImportError, match="LSTM_EXT_BACKEND=aot, but the extension supports Linux on x86-64 with"
    ):
        loader.extension()


def test_an_installed_package_that_is_hidden_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clone, its own lstm_ext/ comes before the one that pip has installed and built."""
    installed = tmp_path / "site" / "lstm_ext"
    (installed / "native").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "site")])
    assert jit._hidden() == ""
    (installed / "native" / config.RECORD).touch()
    assert f"{installed} is installed and built" in jit._hidden()


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_backend_on_request_does_not_warn(project: Project, backend: str) -> None:
    returncode, out, err = project.run("-c", USE, LSTM_EXT_BACKEND=backend)
    assert (returncode, out) == (0, "0"), err


# What was done before, the variables, and the text of the last error.
ERRORS: dict[str, tuple[Callable[[Project], object], dict[str, str], str]] = {
    "an unwritable cache": (
        lambda project: (project.root / "jit").touch(), {"LSTM_EXT_BACKEND": "jit"},
        "set TORCH_EXTENSIONS_DIR to a folder that you can write",
    ),
    "a backend that is not there": (
        lambda project: None, {"LSTM_EXT_BACKEND": "aot"},
        "ImportError: LSTM_EXT_BACKEND=aot, but there is no lstm_ext.native._C: build it with",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_what_to_do(project: Project, name: str) -> None:
    prepare, environment, said = ERRORS[name]
    prepare(project)
    assert said in project.last_error(SHOW, **environment)


def unfit(project: Project, said: str) -> None:
    """A library that does not fit: torch's own operator computes, and an error only says so if it was asked for."""
    returncode, out, err = project.run("-c", USE)
    assert returncode == 0, err
    count, _, message = out.partition("\n")
    assert count == "1" and said in message and f"`{BUILD}` compiles them" in message, out
    error = project.last_error(SHOW, LSTM_EXT_BACKEND="aot")
    assert error.startswith("ImportError: LSTM_EXT_BACKEND=aot, but ") and ": build it with" in error
    assert said in error


NIGHTLY = f"{torch.__version__.partition('+')[0]}.dev20260901"


@pytest.mark.parametrize(
    ("version", "libraries", "said"),
    [
        ("1.2.3", {}, f"was built for torch 1.2.3, and torch {torch.__version__} is installed"),
        (NIGHTLY, {}, f"was built for torch {NIGHTLY}, and torch {torch.__version__} is installed"),
        (None, {}, f"has no {config.RECORD} beside it"),
        (torch.__version__, {"ops": None}, f"has no {config.OPS_LIBRARY} beside it"),
    ],
    ids=["another torch", "a nightly build", "nobody knows what", "one library without the other"],
)
def test_a_library_that_does_not_fit(
    project: Project, version: str | None, libraries: dict, said: str
) -> None:
    project.ahead_of_time(version, **libraries)
    unfit(project, said)


@pytest.mark.parametrize("broken", ["python", "operators"])
def test_undefined_symbol(project: Project, broken: str) -> None:
    contents = {}
    for name, link_flags in (
        ("operators", config.ops_link_flags(config.OPS_LIBRARY)),
        ("python", config.module_link_flags("./operators.so")),
    ):
        contents[name] = project.compiled(name, link_flags, *(["-DBROKEN"] if name == broken else []))
    project.ahead_of_time(torch.__version__, contents["python"], contents["operators"])
    unfit(project, f"does not fit the installed torch {torch.__version__} (")
    assert "missing_from_torch" in project.last_error(SHOW, LSTM_EXT_BACKEND="aot")


MINOR = ".".join(torch.__version__.split(".")[:2])
SHOW_CUDA = SHOW + "; print(loader.status().cuda or loader.status().cuda_reason)"


def test_a_wheel_has_a_library_for_each_torch(project: Project) -> None:
    project.wheel("1.2")
    project.wheel(MINOR)
    show = SHOW + "; print(loader.status().torch_version, loader.status().ops_path)"
    ops = project.package / "native" / config.ops_library(MINOR)
    assert project.run("-c", show) == (0, f"aot\n{MINOR}.9 {ops}", "")
    ops.unlink()
    unfit(project, f"has no {ops.name} beside it")


def test_the_modules_of_a_python_with_and_without_the_gil(project: Project) -> None:
    """Both may lie in one folder. A wheel that has only the other one's has none for this Python."""
    project.wheel(MINOR)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    others = suffix.replace(f"{tag}t", tag) if "t" in sys.abiflags else suffix.replace(tag, f"{tag}t")
    assert others != suffix
    mine, theirs = (project.package / "native" / f"_C-{MINOR}{name}" for name in (suffix, others))
    theirs.write_bytes(b"no library")
    assert project.run("-c", SHOW, LSTM_EXT_BACKEND="aot") == (0, "aot", "")
    mine.rename(theirs)
    assert "the wheel has no library for torch" in project.last_error(SHOW, LSTM_EXT_BACKEND="aot")


def test_a_torch_that_the_wheel_lacks(project: Project) -> None:
    project.wheel("1.2")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}{sys.abiflags}"
    said = f"the wheel has no library for torch {MINOR} with Python {version}"
    unfit(project, said)
    assert project.run("-m", "lstm_ext.build")[0] == 0
    assert project.run("-c", SHOW) == (0, "jit", "")


def test_a_build_with_cuda_comes_before_a_wheel(project: Project) -> None:
    """In place of a torch with CUDA, a number says that it is one."""
    project.wheel(MINOR)
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", "CUDA_HOME": str(project.root)}
    code = f"import torch; torch.version.cuda = '13.0'; {SHOW_CUDA}"
    returncode, out, err = project.run("-c", code, **environment)
    assert returncode == 0, err
    assert out.startswith("aot\nthe wheel has none; with nvcc of CUDA 13")
    assert f"`LSTM_EXT_CUDA=1 {BUILD}` builds them" in out
    build = "import torch; torch.version.cuda = '13.0'; from lstm_ext import build; build.main()"
    said = project.run("-c", build, LSTM_EXT_CUDA="1", **environment)[2]
    assert "LSTM_EXT_CUDA=1, but nvcc was not found" in said

    # A build on request that is finished.
    place = "from lstm_ext.native import config, jit; print(jit.folder(jit.source_dir(), 'cuda', '9.0'))"
    folder = Path(project.run("-c", place)[1])
    assert project.run("-c", SHOW, LSTM_EXT_BACKEND="jit")[1] == "jit"
    (built,) = (path.parent for path in (project.root / "jit").glob("*/lstm_ext_ops.so"))
    shutil.copytree(built, folder)
    record = config.read_record(folder) | {"cuda": "13.0 for 9.0"}
    (folder / config.RECORD).write_text(json.dumps(record))
    assert project.run("-c", code, **environment)[:2] == (0, "jit\n13.0 for 9.0")
    # Also without the variable that named its architectures.
    assert project.run("-c", code)[1] == "jit\n13.0 for 9.0"
    said = {"LSTM_EXT_CUDA": "0", "LSTM_EXT_BACKEND": "aot"}
    for name, value in said.items():
        out = project.run("-c", code, **environment, **{name: value})[1]
        assert out.startswith(f"aot\n{name}={value} asks for ")
    folder.chmod(0o777)
    returncode, out, err = project.run("-c", code, **environment)
    assert out.startswith("aot\n")
    assert "a build with CUDA kernels is not used: " in err
    assert "chmod go-w" in err
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("torch_cuda", "library", "expected"),
    [
        ("13.2", None, "13.0 for 9.0"),
        (None, None, "this torch is a build without CUDA"),
        (
            "12.8",
            None,
            "the wheel has those of CUDA 13; with nvcc of CUDA 12 and a C++ compiler, `LSTM_EXT_CUDA=1",
        ),
        ("13.0", "", f"the wheel has none for torch {MINOR}; with nvcc"),
        ("13.0", "no library", f"{config.cuda_library(MINOR)} does not load ("),
    ],
    ids=["fits", "no CUDA", "another CUDA", "another torch", "broken"],
)
def test_the_cuda_kernels_of_a_wheel(
    project: Project, torch_cuda: str | None, library: str | None, expected: str
) -> None:
    """The kernels of the CPU are there in any case."""
    project.wheel(MINOR, "13.0 for 9.0")
    place = project.package / "native" / config.cuda_library(MINOR)
    if library is not None:
        place.write_text(library) if library else place.unlink()
    code = f"import torch; torch.version.cuda = {torch_cuda!r}; {SHOW_CUDA}"
    returncode, out, err = project.run("-c", code)
    assert (returncode, err) == (0, "") and out.startswith(f"aot\n{expected}")
    if expected == "13.0 for 9.0":
        build = "import torch; torch.version.cuda = '13.0'; from lstm_ext import build; build.main()"
        assert "CUDA kernels: 13.0 for 9.0" in project.run("-c", build, LSTM_EXT_CUDA="1")[1]
        assert project.run("-c", code, LSTM_EXT_CUDA="0")[1] == "aot\nLSTM_EXT_CUDA=0 asks for none"


def test_libraries_of_different_builds(tmp_path: Path) -> None:
    """The CPU backend of another build, in the place of the one that belongs to the operators."""
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        'static const char* table[8] = {"x"}; const void* lstm_ext_cpu_library(void) { return table; }'
    )
    command, _ = config.find_compiler()
    subprocess.run([command, "-x", "c", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    program = [sys.executable, "-c", "import lstm_ext; lstm_ext.native.loader.extension()"]
    run = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        "ImportError: lstm_ext: its libraries are of different builds"
    )


def test_a_build_without_kernels_for_the_processor_says_so(tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    sources = [str(CSRC / "cpu" / f"{name}.cpp") for name in ("capability", "wait_limit")]
    command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{CSRC}", *sources, "-o", str(library)]
    subprocess.run(command, check=True)

    class Library(ctypes.Structure):
        _fields_ = (
            ("build", ctypes.c_char_p),
            ("capability", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)),
            ("set_capability", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_char_p)),
        )

    function = ctypes.CDLL(str(library)).lstm_ext_cpu_library
    function.restype = ctypes.POINTER(Library)
    found = function().contents
    said = found.capability(ctypes.byref(ctypes.c_void_p()))
    assert b"no kernels for this CPU" in said and b"LSTM_EXT_CPU_SETS" in said


@pytest.mark.parametrize(
    # An extension that was built ahead of time is loaded by the import, in which functions of the package wait for it.
    ("backend", "said"),
    [("auto", ["waited", "imported", "at once"]), ("reference", ["imported"])],
)
def test_functions_that_wait_for_the_extension(backend: str, said: list[str]) -> None:
    program = (
        "from lstm_ext.native import loader\n"
        "loader.on_load(lambda: print('waited'))\n"
        "print('imported')\n"
        "loader.extension()\n"
        "loader.on_load(lambda: print('at once'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"LSTM_EXT_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert run.stdout.splitlines() == said, run.stderr


def test_operators_of_another_file_are_an_error(tmp_path):
    """Loading a second library that registers them would end the process."""
    from lstm_ext.native import loader

    copy = tmp_path / config.OPS_LIBRARY
    shutil.copy(str(loader.status().ops_path), copy)
    program = (
        f"import torch; torch.ops.load_library({str(copy)!r})\n"
        "import lstm_ext\n"
        "try: lstm_ext.LSTM(3, 4)(torch.randn(5, 2, 3))\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"registered in this process already, by {copy}" in run.stdout
