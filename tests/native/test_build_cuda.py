"""Which builds get CUDA kernels, with what, and what a user is told when they get none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_build import SHOW, Project, needed_by

from lstm_ext.layer import cuda_kernels
from lstm_ext.native import config, loader

pytestmark = pytest.mark.tools


SHOW_CUDA = SHOW + "; print(loader.status().cuda); print(loader.status().cuda_reason)"
ALL = ";".join(config.ARCHITECTURES) + "+PTX"
HEADERS = ("cuda_runtime_api.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h", "cusparse.h")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "with a space")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LSTM_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CUDA_PATH", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config, "gpu_capabilities", list)


Toolkit = Callable[..., Path]


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toolkit:
    """Makes a CUDA toolkit whose nvcc compiles nothing, and sets CUDA_HOME to it."""

    def make(
        version: str = "13.0",
        knows: str = " ".join(config.ARCHITECTURES).replace(".", "") + " 87 121",
        compile: str = "true",
        headers=HEADERS,
    ) -> Path:
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True)
        (home / "include").mkdir()
        for header in headers:
            (home / "include" / header).touch()
        (home / "bin" / "nvcc").write_text(
            "#!/bin/sh\n"
            f"case $1 in --version) echo 'release {version}, V{version}.48';;\n"
            f"--list-gpu-arch) for n in {knows}; do echo compute_$n; done;;\n"
            f"*) {compile};; esac\n"
        )
        (home / "bin" / "nvcc").chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        return home

    return make


def test_sources_of_a_build_without_cuda(tmp_path: Path) -> None:
    plain = ("python.cpp", "ops.cpp", "cuda/heuristics.cpp", "torch/stepwise_layer.cpp", "cpu/plan.cpp")
    cuda = ("cuda/stepwise_f32.cu", "ops_cuda.cpp", "torch/gemm_cublas.cpp", "torch/cuda_stream.cpp")
    for name in (*plain, *cuda):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert config.sources(tmp_path, with_cuda=False) == sorted(tmp_path / name for name in plain)
    assert config.sources(tmp_path, with_cuda=True) == sorted(tmp_path / name for name in (*plain, *cuda))


def test_a_toolkit_that_fits(toolkit: Toolkit) -> None:
    home = toolkit()
    cuda, reason = config.choose_cuda("13.0")
    assert reason is None
    assert cuda == config.Cuda(home, "13.0", ALL, (), ())
    text = f"13.0 for {ALL.replace(';', ' ')}"
    assert str(cuda) == text
    assert f'-DLSTM_EXT_CUDA_BUILD="{text}"' in config.compile_flags(cuda)
    assert not [flag for flag in config.compile_flags(None) if "CUDA" in flag]


def test_the_oldest_gpu_is_said_twice_and_the_same() -> None:
    directory = config.source_dir()
    assert directory is not None
    text = (directory / "torch" / "cuda_backend.cpp").read_text()
    major, minor = config.OLDEST_CAPABILITY
    assert minor == 0 and f"properties->major >= {major}" in text
    assert f"need compute capability {major}.{minor} or later" in text


@pytest.mark.parametrize(
    ("knows", "gpus", "chosen", "expected"),
    [
        ("80 86 87 89 90", [], None, "8.0;8.6;8.9;9.0+PTX"),
        ("80 86 87 89 90", [(9, 0), (8, 6), (9, 0)], None, "8.6;9.0+PTX"),
        ("80 86 87 89 90", [(7, 5)], None, "8.0;8.6;8.9;9.0+PTX"),
        ("80 86 87 89 90", [(12, 0)], None, "8.0;8.6;8.9;9.0+PTX"),
        ("80 86 87 89 90", [(9, 0)], "8.0 9.0a", "8.0 9.0a"),
        ("80 86 87 89 90", [], "native", "8.0;8.6;8.9;9.0+PTX"),
    ],
    ids=["no GPU", "GPUs", "old GPU", "newer GPU", "chosen", "native"],
)
def test_architectures(
    toolkit: Toolkit,
    monkeypatch: pytest.MonkeyPatch,
    knows: str,
    gpus: list[tuple[int, int]],
    chosen: str | None,
    expected: str,
) -> None:
    toolkit(knows=knows)
    monkeypatch.setattr(config, "gpu_capabilities", lambda: gpus)
    if chosen is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", chosen)
    assert config.find_cuda("13.0").architectures == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"version": "12.4"},
            "is CUDA 12.4, and this torch was built for CUDA 13.0: install the CUDA toolkit 13.x",
        ),
        (
            {"compile": "echo '/usr/include/x.h: error: GNU 99' >&2; exit 1"},
            "does not work (/usr/include/x.h: error: GNU",
        ),
        ({"compile": "exit 3"}, "does not work (exit code 3)"),
        ({"knows": "70 75"}, "knows none of 8.0, 8.6"),
        ({"headers": HEADERS[:-1]}, "cusparse.h was not found in"),
    ],
    ids=["version", "host compiler", "silent", "old", "headers"],
)
def test_a_toolkit_that_does_not_fit(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], said: str
) -> None:
    toolkit(**options)
    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)  # no wheels with headers
    cuda, reason = config.choose_cuda("13.0")
    assert cuda is None
    assert said in reason
    assert "\n" not in reason

    monkeypatch.setenv("LSTM_EXT_CUDA", "1")
    with pytest.raises(config.BuildError) as caught:
        config.choose_cuda("13.0")
    assert str(caught.value) == f"LSTM_EXT_CUDA=1, but {reason}"


def test_no_nvcc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cuda, reason = config.choose_cuda("13.0")
    assert cuda is None
    assert reason == (
        f"nvcc was not found in CUDA_HOME={tmp_path}: "
        "install the CUDA toolkit 13.x, which has nvcc, or set CUDA_HOME to its folder."
    )


def test_a_script_that_starts_nvcc(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own folder is not the toolkit's; nvcc says which is."""
    home = toolkit(compile='case $1 in --dryrun) echo "#$ TOP=$(dirname $0)/..";; esac')
    monkeypatch.delenv("CUDA_HOME")
    script = tmp_path / "elsewhere" / "nvcc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    assert config.find_cuda("13.0").home == home


def test_an_nvcc_that_is_too_old(toolkit: Toolkit) -> None:
    toolkit(version="12.3")
    cuda, reason = config.choose_cuda("12.6")
    assert cuda is None and "is CUDA 12.3, and the kernels need nvcc 12.4 or later" in reason


def test_a_toolkit_that_pip_installed(
    toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is found, and the linker finds its runtime library, which has no name without a version."""
    home = tmp_path / "nvidia" / "cu13"
    home.parent.mkdir()
    toolkit().rename(home)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(config, "USUAL_TOOLKITS", tmp_path / "none")
    cuda = config.find_cuda("13.0")
    assert cuda.home == home and config.runtime_flags(cuda, tmp_path / "build") == []

    (home / "lib").mkdir()
    source = tmp_path / "empty.c"
    source.touch()
    runtime = home / "lib" / "libcudart.so.13"
    link = ["gcc", "-shared", str(source), "-o"]
    subprocess.run([*link, str(runtime), "-Wl,-soname,libcudart.so.13"], check=True)
    flags = [*config.runtime_flags(cuda, tmp_path / "build"), "-Wl,--no-as-needed", "-lcudart"]
    subprocess.run([*link, str(tmp_path / "linked.so"), *flags], check=True)
    assert "libcudart.so.13" in needed_by(tmp_path / "linked.so")
    (home / "lib" / "libcudart.so").symlink_to(runtime)
    assert config.runtime_flags(cuda, tmp_path / "build") == []


def test_headers_of_torchs_wheels(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    toolkit(headers=HEADERS[:1])
    include = tmp_path / "nvidia" / "cu13" / "include"
    include.mkdir(parents=True)
    for header in HEADERS[1:]:
        (include / header).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    assert config.find_cuda("13.0").header_dirs == (str(include),)


def test_the_compiler_of_cxx_is_nvccs_too(toolkit: Toolkit, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit()
    command = shutil.which(config.find_compiler()[0])
    monkeypatch.setenv("CXX", str(command))
    assert config.find_cuda("13.0").nvcc_flags == (f"-ccbin={command}",)
    monkeypatch.setenv("CC", "gcc")  # torch hands it on itself
    assert config.find_cuda("13.0").nvcc_flags == ()


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.choose_cuda(None) == (None, "this torch is a build without CUDA")
    monkeypatch.setenv("LSTM_EXT_CUDA", "0")
    assert config.choose_cuda("13.0") == (None, "LSTM_EXT_CUDA=0 asks for none")
    monkeypatch.setenv("LSTM_EXT_CUDA", "1")
    with pytest.raises(config.BuildError, match="LSTM_EXT_CUDA=1, but this torch is a build without CUDA"):
        config.choose_cuda(None)


def test_capabilities_from_the_drivers_library(tmp_path: Path) -> None:
    source = tmp_path / "nvml.cpp"
    source.write_text("""
        extern "C" int nvmlInit_v2() { return 0; }
        extern "C" int nvmlShutdown() { return 0; }
        extern "C" int nvmlDeviceGetCount_v2(unsigned* count) { *count = 3; return 0; }
        extern "C" int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** device) {
          *device = reinterpret_cast<void*>(static_cast<unsigned long>(index) << 40);  // a pointer's 64 bits
          return 0;
        }
        extern "C" int nvmlDeviceGetCudaComputeCapability(void* device, int* major, int* minor) {
          const unsigned long index = reinterpret_cast<unsigned long>(device) >> 40;
          *major = 8 + index;
          *minor = 6 * (index == 0);
          return index == 1 ? 999 : 0;  // a GPU that is lost
        }
    """)
    command, _ = config.find_compiler()
    subprocess.run([command, "-shared", "-fPIC", source, "-o", tmp_path / "libnvidia-ml.so.1"], check=True)
    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('config', {config.__file__!r})\n"
        "sys.modules['config'] = module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.gpu_capabilities(), module.requested_architectures())\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={"LD_LIBRARY_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.stdout.strip() == "[(8, 6), (10, 0)] 8.6;10.0+PTX", run.stderr


@pytest.mark.parametrize(
    ("capability", "built", "said"),
    [
        ((8, 0), "13.0 for 8.0", None),
        ((8, 9), "13.0 for 8.0 8.6", None),
        ((9, 0), "13.0 for 8.0 8.6+PTX", None),
        ((9, 0), "13.0 for 8.0 8.6", "built for 8.0 8.6: rebuild it with TORCH_CUDA_ARCH_LIST=9.0"),
        ((8, 0), "13.0 for 8.6+PTX", "TORCH_CUDA_ARCH_LIST=8.0"),
        ((10, 3), "13.0 for 10.0a 9.0a", "TORCH_CUDA_ARCH_LIST=10.3"),
        ((7, 5), "13.0 for 7.5", "need compute capability 8.0 or later"),
        ((9, 0), "13.0 for Hopper", None),
    ],
)
def test_which_gpus_a_build_runs_on(capability: tuple[int, int], built: str, said: str | None) -> None:
    reason = cuda_kernels.unsupported(capability, built)
    assert reason is None if said is None else said in reason


def test_the_binary_and_the_record_agree() -> None:
    module, status = loader.extension(), loader.status()
    assert module.build_info()["cuda"] == (status.cuda or "")
    assert (status.cuda is None) == (status.cuda_reason is not None)


def test_operators_have_cuda_kernels_if_the_build_says_so() -> None:
    operators = [
        name
        for name in torch._C._dispatch_get_all_op_names()
        # Those on torch's operator have one kernel for all devices.
        if name.startswith("lstm_ext::") and not name.startswith("lstm_ext::torchs_")
    ]
    assert operators
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert {has_kernel(name, "CUDA") for name in operators} == {loader.status().cuda is not None}


# ---- whole builds. A torch that says it has CUDA is enough to see what happens without nvcc.

PRETEND = "import torch; torch.version.cuda = '13.0'; "
JIT = {"LSTM_EXT_BACKEND": "jit"}


def test_on_request_without_nvcc(project: Project, tmp_path: Path) -> None:
    said = "nvcc was not found in CUDA_HOME="
    returncode, out, err = project.run("-c", PRETEND + SHOW_CUDA, CUDA_HOME=str(tmp_path), **JIT)
    assert returncode == 0, err
    assert out.startswith(f"jit\nNone\n{said}")
    assert f"the extension is built without CUDA kernels: {said}" in err
    # It is said when it is built, and by `python -m lstm_ext.info`, not in every process.
    assert project.run("-c", PRETEND + SHOW_CUDA, CUDA_HOME=str(tmp_path), **JIT) == (0, out, "")

    error = project.last_error(PRETEND + SHOW, CUDA_HOME=str(tmp_path), **JIT, LSTM_EXT_CUDA="1")
    assert error.startswith(f"ImportError: LSTM_EXT_CUDA=1, but {said}")
    returncode, out, _ = project.run("-c", PRETEND + SHOW_CUDA, LSTM_EXT_CUDA="0", **JIT)
    assert (returncode, out) == (0, "jit\nNone\nLSTM_EXT_CUDA=0 asks for none")


def test_ahead_of_time_without_nvcc(project: Project, tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[2] / "setup.py", project.root)
    (project.root / "pretend.py").write_text(
        "import runpy, sys, torch; torch.version.cuda = '13.0'; del sys.argv[0]; runpy.run_path('setup.py')\n"
    )
    build = ("pretend.py", "setup.py", "-q", "build_ext", "--inplace")
    returncode, _, err = project.run(*build, CUDA_HOME=str(tmp_path))
    assert returncode == 0, err
    assert "warning: the extension is built without CUDA kernels: nvcc was not found in CUDA_HOME=" in err
    record = config.read_record(project.package / "native")
    assert record["cuda"] is None
    assert record["cuda_reason"].startswith("nvcc was not found in CUDA_HOME=")
    assert project.run("-c", SHOW_CUDA)[1] == f"aot\nNone\n{record['cuda_reason']}"

    returncode, _, err = project.run(*build, CUDA_HOME=str(tmp_path), LSTM_EXT_CUDA="1")
    assert returncode == 1
    assert err.splitlines()[-1].startswith("error: LSTM_EXT_CUDA=1, but nvcc was not found")


# ---- whole builds with CUDA, where there is a toolkit for this torch

TINY_CU = """
#include <cuda_runtime.h>
#include "tiny.cuh"
__global__ void tiny_kernel(float* x) { *x = TINY_VALUE; }
extern "C" cudaError_t tiny_launch(float* x) {
  tiny_kernel<<<1, 1>>>(x);
  return cudaGetLastError();
}
"""
TINY_GLUE = """
#include <c10/cuda/CUDAFunctions.h>
#include <ATen/cuda/CUDAContextLight.h>  // includes cusparse.h, cublas_v2.h and others
#ifndef LSTM_EXT_CUDA_BUILD
#error "compiled without CUDA"
#endif
extern "C" cudaError_t tiny_launch(float* x);
extern "C" __attribute__((visibility("default"))) int tiny_devices() {
  return tiny_launch(nullptr) == cudaSuccess ? c10::cuda::device_count() : 0;
}
"""


@pytest.fixture(scope="module")
def cuda() -> config.Cuda:
    found, reason = config.choose_cuda(torch.version.cuda)
    if found is None:
        pytest.skip(f"no build with CUDA here: {reason}")
    return found


@pytest.fixture
def cuda_project(project: Project, cuda: config.Cuda) -> Project:
    csrc = project.root / "csrc"
    (csrc / "cuda").mkdir()
    (csrc / "cuda" / "tiny_kernel.cu").write_text(TINY_CU)
    (csrc / "tiny.cuh").write_text("#define TINY_VALUE 1.0f\n")
    (csrc / "ops_cuda.cpp").write_text(TINY_GLUE)
    return project


def test_ahead_of_time_with_cuda(cuda_project: Project, cuda: config.Cuda) -> None:
    project = cuda_project
    shutil.copy(Path(__file__).parents[2] / "setup.py", project.root)
    build = ("setup.py", "build_ext", "--inplace")
    returncode, _, err = project.run(*build, TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX")
    assert returncode == 0, err
    assert project.run("-c", SHOW_CUDA) == (0, f"aot\n{cuda.version} for 8.0 9.0+PTX\nNone", "")
    ops_library = project.package / "native" / config.OPS_LIBRARY
    assert "libc10_cuda.so" in needed_by(ops_library)
    code = f"import ctypes, torch; print(ctypes.CDLL({str(ops_library)!r}).tiny_devices() >= 0)"
    assert project.run("-c", code)[:2] == (0, "True")

    # The same folder without CUDA, and with it again.
    returncode, _, err = project.run(*build, LSTM_EXT_CUDA="0")
    assert returncode == 0, err
    assert project.run("-c", SHOW_CUDA)[1] == "aot\nNone\nLSTM_EXT_CUDA=0 asks for none"
    assert "libc10_cuda.so" not in needed_by(ops_library)


def test_on_request_with_cuda(cuda_project: Project, cuda: config.Cuda) -> None:
    project = cuda_project
    environment = {"TORCH_CUDA_ARCH_LIST": "8.0", **JIT}
    # torch.utils.cpp_extension looks for CUDA when it is imported, here where it cannot find it.
    code = "import os; os.environ['CUDA_HOME'] = '/nowhere'; import torch.utils.cpp_extension"
    code += f"; del os.environ['CUDA_HOME']; {SHOW_CUDA}"
    returncode, out, err = project.run("-c", code, **environment)
    assert (returncode, out) == (0, f"jit\n{cuda.version} for 8.0\nNone"), err
    # Once built it needs no nvcc.
    without = {"CUDA_HOME": "/nowhere", "CXX": "no-such-compiler"}
    assert project.run("-c", SHOW_CUDA, **environment, **without) == (0, out, "")

    (project.root / "csrc" / "cuda" / "tiny_kernel.cu").write_text("#error broken kernel\n")
    error = project.last_error(SHOW, **environment)
    assert "broken kernel" in error
    assert error.endswith("(LSTM_EXT_CUDA=0 builds the CPU kernels alone)")
