"""What another user can have written is neither loaded nor believed, and whatever is in a record does no harm."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_selftest import Gpus

from lstm_ext import info
from lstm_ext.call import cuda_choice
from lstm_ext.layer import cuda_kernels
from lstm_ext.native import config, jit, loader, selftest_record, trust
from lstm_ext.native.config import BuildError

STRANGER = 54321


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    return tmp_path / "cache"


def give_to_a_stranger(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    else:  # then all others become ours
        real = os.lstat

        def lstat(name, *args, **kwargs):
            found = real(name, *args, **kwargs)
            if Path(name) != path:
                return found
            return os.stat_result((*found[:4], STRANGER, *found[5:]))

        monkeypatch.setattr(trust.os, "lstat", lstat)


def test_a_home_that_cannot_be_written() -> None:
    """Nothing is compiled or measured here, so nothing is written, and nothing is said."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")}
    program = "import torch, lstm_ext; lstm_ext.freeze(lstm_ext.LSTM(3, 4))(torch.ones(2, 1, 3))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"HOME": "/proc/none"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_ours_is_trusted(folder):
    (folder / "file").touch(mode=0o644)
    assert trust.distrust(folder / "file") is None
    assert trust.distrust(folder / "not" / "there") is None


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_belongs_to_another_user(folder, which, monkeypatch):
    file = folder / "file"
    file.touch(mode=0o600)
    strange = file if which == "file" else folder
    give_to_a_stranger(strange, monkeypatch)
    reason = trust.distrust(file)
    assert reason.startswith(f"{strange.resolve()} belongs to user {STRANGER}, and not to ")
    assert f"`chown {os.geteuid()} {strange.resolve()}`" in reason


def test_a_sticky_file_is_a_file(folder):
    (folder / "file").touch()
    os.chmod(folder / "file", 0o1666)
    assert "can write" in trust.distrust(folder / "file")


@pytest.mark.parametrize("mode", [0o777, 0o707, 0o772])
def test_what_others_can_write(folder, mode):
    (folder / "file").touch(mode=0o600)
    os.chmod(folder, mode)
    reason = trust.distrust(folder / "file")
    assert "can write" in reason and f"`chmod go-w {folder.resolve()}`" in reason
    os.chmod(folder, mode | 0o1000)  # as /tmp
    assert trust.distrust(folder / "file") is None


def test_what_a_link_leads_to_is_looked_at(folder, tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (folder / "link").symlink_to(elsewhere)
    assert trust.distrust(folder / "link") is None
    os.chmod(elsewhere, 0o777)
    assert str(elsewhere.resolve()) in trust.distrust(folder / "link")


def test_who_can_change_a_link_is_looked_at(folder, tmp_path, monkeypatch):
    """Its target may be ours: somebody else could lead it to another file of ours a moment later."""
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "ours" / "file").touch(mode=0o600)
    (folder / "link").symlink_to("../ours")
    assert trust.distrust(folder / "link" / "file") is None
    assert trust.distrust(folder / "link" / ".." / "ours" / "file") is None
    os.chmod(folder, 0o777)
    assert f"can write {folder}:" in trust.distrust(folder / "link" / "file")
    os.chmod(folder, 0o1777)  # as /tmp, where links of others may lie
    assert trust.distrust(folder / "link" / "file") is None
    give_to_a_stranger(folder / "link", monkeypatch)
    assert f"{folder / 'link'} belongs to user {STRANGER}" in trust.distrust(folder / "link" / "file")


def test_links_without_end_lead_nowhere(folder):
    (folder / "link").symlink_to(folder / "link")
    assert trust.distrust(folder / "link" / "file") is None
    with pytest.raises(OSError, match="symbolic links"):
        (folder / "link" / "file").open()


def test_relative_paths_and_folders_above(folder, monkeypatch):
    (folder / "inner").mkdir(mode=0o700)
    monkeypatch.chdir(folder / "inner")
    assert trust.distrust(Path("file")) is None
    os.chmod(folder, 0o777)
    assert f"can write {folder}:" in trust.distrust(Path("file"))


OWNER, GROUP, MASK, ALL = (
    (0x01, 7, 2**32 - 1),
    (0x04, 0, 2**32 - 1),
    (0x10, 7, 2**32 - 1),
    (0x20, 0, 2**32 - 1),
)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([OWNER, GROUP, ALL], None),
        (
            [OWNER, (0x02, 7, STRANGER), GROUP, MASK, ALL],
            f"user {STRANGER} write .*`setfacl -x u:{STRANGER} ",
        ),
        ([OWNER, (0x02, 5, STRANGER), GROUP, MASK, ALL], None),
        ([OWNER, (0x02, 7, STRANGER), GROUP, (0x10, 5, 2**32 - 1), ALL], None),
        ([OWNER, (0x02, 7, os.geteuid()), GROUP, MASK, ALL], None),
        (
            [OWNER, GROUP, (0x08, 6, STRANGER), MASK, ALL],
            f"group {STRANGER} write .*`setfacl -x g:{STRANGER} ",
        ),
        ([OWNER, GROUP, (0x08, 4, STRANGER), MASK, ALL], None),
        ([OWNER, (0x04, 2, 2**32 - 1), MASK, ALL], "`setfacl -m g::- "),
        ([OWNER, GROUP, MASK, (0x20, 2, 2**32 - 1)], "`chmod o-w "),
    ],
)
def test_access_control_lists(folder, entries, reason, monkeypatch):
    """Beside them, the mode's bits of the group are the mask, and say nothing of the group."""
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    real = os.getxattr

    def getxattr(path, name):
        return value if Path(path) == folder else real(path, name)

    monkeypatch.setattr(trust.os, "getxattr", getxattr)
    monkeypatch.setattr(trust, "_is_private", lambda gid: False)
    os.chmod(folder, 0o770)
    found = trust.distrust(folder / "file")
    assert found is None if reason is None else re.search(reason, found), found


@pytest.mark.parametrize(
    ("gid", "name", "members", "private"),
    [(7, "me", [], True), (7, "me", ["me"], True), (7, "me", ["me", "other"], False), (7, "staff", [], False),
     (8, "me", [], False), (0, "root", ["other"], True)],
)  # fmt: skip
def test_groups(folder, gid, name, members, private, monkeypatch):
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr("grp.getgrgid", lambda _: SimpleNamespace(gr_name=name, gr_mem=members))
    monkeypatch.setattr(trust.os, "getegid", lambda: 7)
    real = os.lstat

    def lstat(path):
        found = real(path)
        return os.stat_result((*found[:5], gid, *found[6:])) if Path(path) == folder else found

    monkeypatch.setattr(trust.os, "lstat", lstat)
    os.chmod(folder, 0o770)
    assert (trust.distrust(folder) is None) == private


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_folders_are_private_whatever_the_umask_is(folder, open_umask):
    trust.make_folder(folder / "a" / "b")
    trust.make_folder(folder / "a" / "b")
    assert [stat.S_IMODE(os.stat(folder / name).st_mode) for name in ("a", "a/b")] == [0o700, 0o700]
    (folder / "file").touch()
    with pytest.raises(NotADirectoryError):
        trust.make_folder(folder / "file" / "below")


def test_a_record_is_believed_whatever_the_umask_is(folder, open_umask):
    cpu = torch.device("cpu")
    selftest_record.write(cpu, ["avx2"], [])
    assert selftest_record.find(cpu) is not None


@pytest.mark.skipif(not config.is_supported_platform(), reason="no build here")
def test_a_build_is_trusted_whatever_the_umask_is(folder, open_umask, monkeypatch):
    directory = jit.folder(jit.source_dir(), "cpu")
    monkeypatch.setattr(
        jit,
        "_PROGRAM",
        "import json, sys\nfor library in json.loads(sys.argv[1]):\n"
        "    open(f'{library[\"name\"]}.so', 'wb').write(b'a library')",
    )
    with jit.exclusive(directory):
        jit.build(jit.source_dir(), directory, None, None, print)
    assert jit.trusted(directory) == directory.resolve()
    assert jit.finished(directory) is not None


def test_a_library_that_is_a_link_is_not_loaded(folder):
    trust.make_folder(folder / "build")
    (folder / "library").touch(mode=0o600)
    jit.module(folder / "build").symlink_to(folder / "library")
    with pytest.raises(BuildError, match=r"lstm_ext_C.so is a symbolic link"):
        jit.trusted(folder / "build")


@pytest.mark.skipif(not config.is_supported_platform(), reason="no build here")
@pytest.mark.parametrize("what", ["the folder", "a library", "the record"])
def test_a_build_that_another_user_could_write_is_not_loaded(folder, what, monkeypatch):
    """It would be code of another user, run as us. Nothing is loaded, and the error names the place and the command."""
    monkeypatch.setenv("LSTM_EXT_CUDA", "0")  # otherwise a torch with CUDA takes another folder, and builds
    directory = jit.folder(jit.source_dir(), "cpu")
    directory.mkdir(parents=True, mode=0o700)
    paths = {
        "the folder": directory,
        "a library": jit.module(directory),
        "the record": directory / config.RECORD,
    }
    if what != "the folder":
        paths[what].touch(mode=0o600)
    give_to_a_stranger(paths[what], monkeypatch)
    monkeypatch.setattr(loader, "_load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BuildError, match=r"is not trusted: .* belongs to .*chown .*TORCH_EXTENSIONS_DIR"):
        loader._load_or_build(print)


def test_a_record_of_the_selftest_that_another_user_could_write_is_not_believed(folder, monkeypatch):
    cpu = torch.device("cpu")
    selftest_record.write(cpu, ["avx2"], [])
    assert selftest_record.find(cpu) is not None
    os.chmod(folder / "lstm_ext", 0o777)
    assert selftest_record.find(cpu) is None
    with pytest.raises(RuntimeError, match=r"is not written, since nobody could trust it: .*chmod go-w"):
        selftest_record.write(cpu, ["avx2"], [])


def test_the_lock_file_is_not_followed_and_not_cut_off(folder):
    victim = folder / "victim"
    victim.write_text("precious")
    directory = folder / "build"
    directory.with_suffix(".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), jit.exclusive(directory):
        pytest.fail("it was locked")
    assert victim.read_text() == "precious"


def test_waiting_has_a_bound_and_names_the_holder(folder, monkeypatch, caplog):
    directory = folder / "build"
    monkeypatch.setattr(jit, "LONGEST_WAIT", 0.3)
    with jit.exclusive(directory):
        assert directory.with_suffix(".lock").read_text() == f"{os.getpid()}\n"
        text = rf"process {os.getpid()} has held .*TORCH_EXTENSIONS_DIR"
        with pytest.raises(BuildError, match=text), jit.exclusive(directory):
            pytest.fail("two hold it")
    assert f"waiting for process {os.getpid()}" in caplog.text
    with jit.exclusive(directory):  # it is free again
        pass


def test_who_waits_goes_on(folder, monkeypatch):
    directory = folder / "build"
    directory.with_suffix(".lock").touch()
    with open(directory.with_suffix(".lock")) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        timer = threading.Timer(0.3, lambda: fcntl.flock(held, fcntl.LOCK_UN))
        timer.start()
        with jit.exclusive(directory):
            pass
        timer.join()


# ---- what is in a record

WRONG = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'"\xff"',
    "an integer without end": b"1" * 10_000,
    "an integer that is no float": b"1" + b"0" * 400,
    "nested": b"[" * 1_000_000 + b"]" * 1_000_000,
    "too large": b"[" + b" " * (1 << 24) + b"]",
}


@pytest.mark.parametrize("kind", [*WRONG, "absent", "a folder", "a FIFO", "unreadable"])
def test_a_file_that_holds_no_record(folder: Path, kind: str) -> None:
    file = folder / "file"
    if kind in WRONG:
        file.write_bytes(WRONG[kind])
    elif kind == "a folder":
        file.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(file)
    elif kind == "unreadable":
        file = Path("/proc/self/mem")  # also for root
    assert config.read_json(file, object) is None


JSON = (None, True, 10**17, float("inf"), "text", [], ["text", 1], {"text": []})


def damaged(value: Any) -> Iterator[Any]:
    """All that comes of a value if another one stands in one place of it, or none."""
    yield from JSON
    for place in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for other in damaged(value[place]):
            copy = value.copy()
            copy[place] = other
            yield copy
        copy = value.copy()
        del copy[place]
        yield copy


@pytest.mark.filterwarnings("ignore:lstm_ext. .* is damaged")
def test_whatever_is_in_the_users_record(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that reads it goes on, and the next result is recorded."""
    Gpus(monkeypatch, "13.0 for 8.0", (8, 6))
    gpu = torch.device("cuda", 0)
    key = dict.fromkeys(selftest_record.KEY, "this")
    monkeypatch.setattr(selftest_record, "key_of", lambda device: key)
    monkeypatch.setattr(selftest_record, "distrust", lambda path: None)  # it takes longer than all else
    shape = cuda_choice.class_of(torch.bfloat16, 32, 0, 1, False, True, False, batch=8, steps=20)

    def use() -> int:
        monkeypatch.setattr(cuda_choice, "_records", {})
        choices = cuda_choice.recorded(gpu).values()
        for choice in choices:
            assert str(choice)
            cuda_choice._tell_kernels(shape, gpu, choice.kernel, choice.kernel)
        cuda_choice._ours_in_graph(0, torch.bfloat16, 1, False, True, False)
        assert cuda_kernels.outcome(gpu, "step", torch.bfloat16) in (None, True)
        info._device_lines(gpu, loader.status())
        return len(choices)

    choice = cuda_choice.asdict(cuda_choice.Choice(True, "step", {"torch": 2.0, "step": 1.0}))
    selftest_record.write(gpu, ["step"], ["persistent"], {shape.key: choice})
    try:
        assert use() == 1
        for record in damaged(json.loads(selftest_record.path().read_text())):
            selftest_record.path().write_text(json.dumps(record))
            use()
            selftest_record.add(gpu, "stepwise", True)
            assert "stepwise" in selftest_record.find(gpu)["passed"], record
    finally:
        cuda_choice._tell_kernels(shape, gpu, "", "")


def test_whatever_is_in_the_record_of_a_build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one on request, or of a wheel."""
    build = jit.folder(jit.source_dir(), "cpu")
    build.mkdir(parents=True)
    minor = ".".join(torch.__version__.split(".")[:2])
    suffix = config.sysconfig.get_config_var("EXT_SUFFIX")
    for name in (f"_C{suffix}", f"_C-{minor}{suffix}", config.OPS_LIBRARY, config.ops_library(minor)):
        (build / name).touch()
    for path in (jit.module(build), jit.ops_library(build)):
        path.touch()
    monkeypatch.setattr(config, "LIBRARIES", build)
    monkeypatch.setattr(config, "commit", lambda: None)
    monkeypatch.setattr(loader, "_load", lambda *_: None)
    config.write_record(
        build, torch.__version__, "g++", config.digest(jit.source_dir()),
        wheel={minor: torch.__version__}, cuda="13.0 for 8.0", cpu_sets=",".join(config.CPU_SETS[config.machine()]),
        sizes=[0, 0],
    )  # fmt: skip

    def use() -> int:
        found = [loader._load_finished(build)]
        with contextlib.suppress(ImportError):
            found.append(loader._load_aot("none"))
        for result in filter(None, found):
            cuda_kernels.unsupported((8, 0), result.status.cuda or "")
            info._changed_sources(result.status)
        info._commit()
        info._built_at(config.read_record(build))
        return len([*filter(None, found), *jit.finished_with_cuda()])

    assert use() == 3
    for record in damaged(json.loads((build / config.RECORD).read_text())):
        (build / config.RECORD).write_text(json.dumps(record))
        use()
