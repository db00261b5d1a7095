"""The build of the C library: what it installs, its interface, and the programs of examples/native."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from c_library import ROOT, Model, Stream, built

import lstm_ext
from lstm_ext import native_library
from lstm_ext.native import config

EXAMPLES = ROOT / "examples" / "native"
PAGE = (ROOT / "docs" / "guide" / "c-library.md").read_text()


def said(*command: object, **environment: str) -> str:
    run = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | environment, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def header() -> Path:
    return ROOT / "csrc" / "library" / "lstm_ext.h"


@pytest.mark.parametrize(
    "command",
    [("gcc", "-std=c99", "-x", "c"), ("gcc", "-std=c17", "-x", "c"), ("g++", "-std=c++11", "-x", "c++")],
    ids=lambda command: command[1],
)
def test_header_compiles(command: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text('#include "lstm_ext.h"\n#include "lstm_ext.h"\nint main(void) { return 0; }\n')
    said(
        *command, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", f"-I{header().parent}", source
    )


def test_the_page_compiles(tmp_path: Path) -> None:
    """Its blocks as one program, with what they leave to the reader."""
    blocks = re.findall(r"```cpp\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    theirs = "int complain(const char*); int next_frame(float*); void read_head(float[3][64], float*); extern int runs;"
    source = tmp_path / "source.c"
    source.write_text(
        "\n".join(["#include <lstm_ext.h>", theirs, "int detector(void) {", *blocks, "return 0; }"])
    )
    said("gcc", "-std=gnu17", "-Wall", "-Werror", "-fsyntax-only", f"-I{header().parent}", source)


def test_header_says_what_is_visible() -> None:
    names = native_library._functions(header().read_text())
    assert {"lstm_ext_abi_version", "lstm_ext_step", "lstm_ext_run_part", "lstm_ext_stream_h"} <= set(names)
    assert len(names) == len(set(names)) == header().read_text().count("\nLSTM_EXT_API ")


def test_the_c_library_is_no_part_of_the_operators(tmp_path: Path) -> None:
    kernels, operators, module = config.split_sources(ROOT / "csrc", False, ("avx2",), tmp_path)
    assert "library/" not in (tmp_path / config.TOGETHER).read_text()
    assert not [path for path in (*kernels, *operators, *module) if path.parent.name == "library"]
    stems = {path.stem for path in config.c_library_sources(ROOT / "csrc", ("avx2",))}
    assert {"model", "stream", "weights_file", "plan", "kernels_avx2_f32"} <= stems
    assert "kernels_avx512_f32" not in stems and "operators" not in stems


@pytest.mark.parametrize(
    ("compiler", "complaint"),
    [
        ("/no/such/compiler", "error: no C++ compiler was found (looked for /no/such/compiler): install one"),
        ("false", "error: the C++ compiler `false` does not work ("),
        ("g++ -no-such-flag", "error: `g++` failed: "),
        ("echo x86_64-w64-mingw32", "error: the C library is for Linux on x86-64 and aarch64, and `echo"),
    ],
)
def test_without_a_compiler(
    compiler: str,
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert native_library.main([str(tmp_path / "prefix")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(complaint) and error.count("\n") == 1
    assert not (tmp_path / "prefix").exists()


@pytest.mark.tools
def test_what_is_installed() -> None:
    prefix = built()
    lib = prefix / "lib"
    assert (prefix / "include" / "lstm_ext.h").read_bytes() == header().read_bytes()
    assert os.readlink(lib / "liblstm_ext.so") == "liblstm_ext.so.1"
    dynamic = said("readelf", "-d", lib / "liblstm_ext.so")
    assert "Library soname: [liblstm_ext.so.1]" in dynamic
    assert "BIND_NOW" in dynamic  # else the first step looks functions of libm up
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
    assert needed <= {"libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2"}
    names = sorted(native_library._functions(header().read_text()))
    for library, *how in ((lib / "liblstm_ext.so", "-D"), (lib / "liblstm_ext.a",)):
        lines = said("nm", "--defined-only", "--extern-only", *how, library).splitlines()
        assert sorted(line.split()[2] for line in lines if len(line.split()) == 3) == names
    version = said("pkg-config", "--modversion", "lstm_ext", PKG_CONFIG_PATH=str(lib / "pkgconfig"))
    assert version.strip() == lstm_ext.__version__


BYTES_OF_A_THREAD = 32  # 16 of libstdc++, one word, and on AArch64 a pointer


def bytes_of_a_thread(library: Path) -> int:
    """What each thread has of the library's variables."""
    segment = re.search(r"^ +TLS +(?:0x\w+ +){4}(0x\w+)", said("readelf", "-lW", library), re.MULTILINE)
    return int(segment[1], 16)


@pytest.mark.tools
def test_copies_side_by_side(tmp_path: Path) -> None:
    """As plug-ins load them. All libraries that are loaded late share 1,664 bytes for the variables of a thread, and
    torch needs some of them."""
    library = built() / "lib" / "liblstm_ext.so.1"
    assert bytes_of_a_thread(library) <= BYTES_OF_A_THREAD
    for i in range(30):
        shutil.copy(library, tmp_path / f"{i}.so")
    program = (
        "import ctypes, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path).lstm_ext_abi_version()\nimport torch"
    )
    said(sys.executable, "-c", program, *sorted(tmp_path.iterdir()))


@pytest.mark.tools
def test_examples(tmp_path: Path) -> None:
    """Both print what Python computes."""
    said("make", "-C", EXAMPLES, f"PREFIX={built()}", f"OUT={tmp_path}", f"PYTHON={sys.executable}")
    weights = tmp_path / "weights"
    features = torch.randn(500, 40)
    (tmp_path / "features").write_bytes(features.numpy().tobytes())
    streaming = said(tmp_path / "streaming", weights, tmp_path / "features")
    y = Stream(Model(weights)).run(features[:, None], step=True)
    found = re.match(r"500 frames on (\w+); the first output of the last one is (.*)\n", streaming)
    assert found and float(found[2]) == pytest.approx(y[-1, 0, 0].item(), rel=1e-6)
    assert re.search(r"a step: median [\d.]+ us, 99\.9th percentile [\d.]+ us\n$", streaming)
    x = (torch.arange(16 * 40) % 7 - 3).float().view(16, 1, 40)
    y = Stream(Model(weights), max_steps=16).run(x)
    no_allocation = said(tmp_path / "no_allocation", weights)
    found = re.fullmatch(r"16 steps in \d+ bytes; the first output of the last one is (.*)\n", no_allocation)
    assert found and float(found[1]) == pytest.approx(y[-1, 0, 0].item(), rel=1e-6)
    for program in ("streaming", "no_allocation"):
        run = subprocess.run([tmp_path / program, EXAMPLES / "save.py"], capture_output=True, text=True)
        assert run.returncode == 1
        assert run.stderr == "error: this is no weights file of lstm_ext: its first bytes are others\n"


@pytest.mark.tools
@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_a_program_of_cmake(tmp_path: Path) -> None:
    shutil.copyfile(EXAMPLES / "streaming.c", tmp_path / "detector.c")
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\n"
        + re.findall(r"```cmake\n(.*?)```", PAGE, re.DOTALL)[0]
        + "target_link_libraries(detector PRIVATE m)\n"
    )
    said("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={built()}")
    said("cmake", "--build", tmp_path / "build")
    said(sys.executable, EXAMPLES / "save.py", tmp_path / "weights")
    assert said(tmp_path / "build" / "detector", tmp_path / "weights").startswith("20000 frames on ")


@pytest.mark.tools
def test_a_program_with_the_archive(tmp_path: Path) -> None:
    """With everything in the program, kernels included, but for libc."""
    prefix, program = built(), tmp_path / "streaming"
    flags = said(
        "pkg-config", "--static", "--cflags", "--libs", "lstm_ext", PKG_CONFIG_PATH=f"{prefix}/lib/pkgconfig"
    )
    said("gcc", "-static", EXAMPLES / "streaming.c", "-o", program, *flags.split())
    said(sys.executable, EXAMPLES / "save.py", tmp_path / "weights")
    assert said(program, tmp_path / "weights").startswith("20000 frames on ")
    run = subprocess.run(
        [program, tmp_path / "weights"],
        capture_output=True,
        text=True,
        env=os.environ | {"LSTM_EXT_CPU_CAPABILITY": "sse9"},
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: LSTM_EXT_CPU_CAPABILITY: expected 'amx', ")
    if config.machine() == "x86_64" and shutil.which("qemu-x86_64"):
        command = ["qemu-x86_64", "-cpu", "Nehalem", program, tmp_path / "weights"]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 1 and run.stderr.count("\n") == 1
        assert run.stderr.startswith("error: lstm_ext has no kernels for this CPU: on x86-64 they need AVX2")


@pytest.mark.tools
def test_from_an_installed_package(tmp_path: Path) -> None:
    """Whose csrc/ is inside the package, into a folder with a space in its name."""
    package = tmp_path / "site" / "lstm_ext"
    # This checkout's: the package under test may be installed, and have csrc/ already.
    shutil.copytree(
        ROOT / "lstm_ext", package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    )
    shutil.copytree(ROOT / "csrc", package / "csrc")
    said(
        sys.executable, "-m", "lstm_ext.native_library", tmp_path / "a prefix",
        PYTHONPATH=str(tmp_path / "site"), LSTM_EXT_BACKEND="torch", LSTM_EXT_CPU_SETS="avx2", CXXFLAGS="-O0",
    )  # fmt: skip
    weights = tmp_path / "weights"
    said(sys.executable, EXAMPLES / "save.py", weights)
    program = tmp_path / "no_allocation"
    folder = f"{tmp_path}/a prefix/lib"
    flags = said("pkg-config", "--cflags", "--libs", "lstm_ext", PKG_CONFIG_PATH=f"{folder}/pkgconfig")
    said("g++", EXAMPLES / "no_allocation.cpp", "-o", program, *shlex.split(flags), f"-Wl,-rpath,{folder}")
    assert said(program, weights).startswith("16 steps in ")


CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.tools
@pytest.mark.skipif(
    not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)),
    reason="there is no cross compiler or no emulator for AArch64",
)
def test_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", CROSS_COMPILER)
    prefix, program, weights = built("-O1"), tmp_path / "no_allocation", tmp_path / "weights"
    assert bytes_of_a_thread(prefix / "lib" / "liblstm_ext.so.1") <= BYTES_OF_A_THREAD
    links = [f"-I{prefix}/include", f"-L{prefix}/lib", "-llstm_ext"]
    said(CROSS_COMPILER, "-static", EXAMPLES / "no_allocation.cpp", "-o", program, *links)
    said(sys.executable, EXAMPLES / "save.py", weights)
    x = (torch.arange(16 * 40) % 7 - 3).float().view(16, 1, 40)
    monkeypatch.delenv("CXX")
    y = Stream(Model(weights), max_steps=16).run(x)
    found = re.search(
        r"the first output of the last one is (.*)\n", said(EMULATOR, "-cpu", "max", program, weights)
    )
    assert found and float(found[1]) == pytest.approx(y[-1, 0, 0].item(), rel=1e-4)
