"""What a build is made of: versions, flags, sources, instruction sets, and the record beside it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lstm_ext
from lstm_ext.native import config, jit

pytestmark = pytest.mark.tools
CSRC = Path(__file__).resolve().parents[2] / "csrc"


def test_version_is_said_once() -> None:
    assert lstm_ext.__version__ == config.VERSION


def test_version_is_that_of_the_changelog() -> None:
    """Between releases it ends with .dev0, and the topmost section has no date; a release has one."""
    release, dev = re.fullmatch(r"(\d+\.\d+\.\d+)(\.dev0)?", config.VERSION).groups()
    text = (CSRC.parent / "CHANGELOG.md").read_text()
    topmost = re.search(r"^## \[(.*?)\](.*)$", text, re.MULTILINE)
    assert topmost[1] == release
    assert re.fullmatch(", not released yet" if dev else r" - \d{4}-\d\d-\d\d", topmost[2])


def test_flags_leave_to_torch_what_is_torchs() -> None:
    link_flags = config.ops_link_flags("ops.so") + config.module_link_flags("ops.so")
    flags = config.COMPILE_FLAGS + config.NVCC_FLAGS + link_flags
    assert not [f for f in flags if f.startswith(("-std", "-march", "-mtune", "-gencode", "-arch"))]
    assert "-fopenmp" in config.COMPILE_FLAGS  # or at::parallel_for is serial, and says nothing
    assert "-fopenmp" not in link_flags
    assert not [f for f in config.NVCC_FLAGS if "arch" in f]  # or torch adds no -gencode, and says nothing


def test_the_range_of_torch_is_said_once() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'dependencies = ["torch>={config.TORCHES[0]}"]' in pyproject


def test_sources_with_one_stem_are_refused(tmp_path: Path) -> None:
    directory = config.source_dir()
    assert directory is not None
    assert config.sources(directory, with_cuda=True)

    (tmp_path / "cpu").mkdir()
    for name in ("cpu/layer.cpp", "layer.cpp"):
        (tmp_path / name).touch()
    with pytest.raises(config.BuildError, match="same stem"):
        config.sources(tmp_path, with_cuda=False)


@pytest.mark.parametrize("kind", ["cpp", "h", "cu", "cuh"])
def test_digest_sees_every_kind_of_source(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.cpp").touch()
    (tmp_path / f"b.{kind}").write_text("1")
    before = config.digest(tmp_path)
    (tmp_path / f"b.{kind}").write_text("2")
    assert config.digest(tmp_path) != before


def test_installed_package_has_every_source() -> None:
    """Or the build on first use lacks it."""
    root = Path(__file__).parents[2]
    pyproject = (root / "pyproject.toml").read_text()
    kinds = {path.suffix[1:] for path in (root / "csrc").rglob("*.*") if path.is_file()}
    assert kinds <= set(config.SOURCE_KINDS)
    for kind in config.SOURCE_KINDS:
        assert f'"**/*.{kind}"' in pyproject


def test_record_is_whole_or_absent(tmp_path: Path) -> None:
    assert config.read_record(tmp_path) is None
    for text in ("", '{"torch": "2.', "[]", '{"torch": 2}'):
        (tmp_path / config.RECORD).write_text(text)
        assert config.read_record(tmp_path) is None
    config.write_record(tmp_path, "2.13.0", "g++", "0")
    assert json.loads((tmp_path / config.RECORD).read_text())["torch"] == "2.13.0"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A Person", "-c", "user.email=person@example.org"]
    run = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


def test_commit_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.commit(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert config.commit(tmp_path) is None  # no commit yet
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "First")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert config.commit(tmp_path) == head[:12]
    (tmp_path / "file").touch()
    assert config.commit(tmp_path) == f"{head[:12]}+changes"
    folder = tmp_path / "site-packages"
    folder.mkdir()
    assert config.commit(folder) is None  # a package inside another project's repository
    monkeypatch.setenv("PATH", "")
    assert config.commit(tmp_path) is None


def test_sets_of_a_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def names(wish: str) -> list[str]:
        monkeypatch.setenv("LSTM_EXT_CPU_SETS", wish)
        kernels, operators, _ = config.split_sources(CSRC, False, config.cpu_sets(), tmp_path)
        assert not set(kernels) & set(operators)
        return sorted({path.stem.split("_")[1] for path in kernels if path.stem.startswith("kernels_")})

    assert names("") == sorted(config.CPU_SETS["x86_64"])
    assert names("avx2,avx512") == ["avx2", "avx512"]
    assert len(names("native")) == 1
    assert names("native")[0] in lstm_ext.native.loader.extension().cpu_capabilities()


def test_sets_of_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The sources of 64-bit ARM are those of its own sets, and the CUDA kernels are among them where there is nvcc."""
    monkeypatch.setattr(config.platform, "machine", lambda: "arm64")
    monkeypatch.delenv("LSTM_EXT_CPU_SETS", raising=False)
    assert config.is_supported_platform() == (sys.platform == "linux")
    assert config.cpu_sets() == ("neon",)
    kernels, operators, _ = config.split_sources(CSRC, True, config.cpu_sets(), tmp_path)
    sets = {path.stem for path in kernels if path.stem.startswith("kernels_")}
    assert sets == {"kernels_neon_f32", "kernels_neon_f64"}
    assert any(path.suffix == ".cu" for path in operators)
    assert config.runs_here("neon") and not config.runs_here("avx2")
    monkeypatch.setenv("LSTM_EXT_CPU_SETS", "native")
    assert config.cpu_sets() == ("neon",)
    monkeypatch.setenv("LSTM_EXT_CPU_SETS", "avx2")
    with pytest.raises(config.SwitchError, match=r"LSTM_EXT_CPU_SETS is 'avx2'.* neon, or unset"):
        config.cpu_sets()
    monkeypatch.setattr(config.platform, "machine", lambda: "riscv64")
    assert not config.is_supported_platform() and not config.runs_here("neon")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("model name\t: Some Processor 9000 \n", "Some Processor 9000"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n", "aarch64 implementer 0x41 part 0xd4f"),
        ("", "aarch64"),
    ],
)
def test_the_name_of_a_processor(monkeypatch: pytest.MonkeyPatch, text: str, name: str) -> None:
    monkeypatch.setattr(config.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(config.Path, "read_text", lambda path: text)
    assert config.processor() == name


def test_a_build_for_other_processors_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a home that machines share; this one has AVX2."""
    monkeypatch.setattr(config, "runs_here", lambda name: name == "avx2")
    found = {sets: jit._runs_here({"cpu_sets": sets}) for sets in ("avx512", "avx512,avx2", "")}
    assert found == {"avx512": False, "avx512,avx2": True, "": False}


def test_all_operators_are_in_the_source_that_includes_them(tmp_path: Path) -> None:
    _, operators, _ = config.split_sources(CSRC, False, (), tmp_path)
    together = (tmp_path / config.TOGETHER).read_text()
    assert operators == [tmp_path / config.TOGETHER]
    for path in CSRC.glob("torch/*.cpp"):
        assert (f'"torch/{path.name}"' in together) != config.needs_cuda(path)
