"""What another user can have written is neither loaded nor believed."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest
import torch

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
        os.chown(path, STRANGER, STRANGER)
    else:  # then all others become ours
        real = os.stat

        def stat(name, *args, **kwargs):
            found = real(name, *args, **kwargs)
            if Path(os.path.realpath(name)) != path.resolve():
                return found
            return os.stat_result((*found[:4], STRANGER, *found[5:]))

        monkeypatch.setattr(trust.os, "stat", stat)


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


@pytest.mark.skipif(not config.is_supported_platform(), reason="no build on first use here")
@pytest.mark.parametrize("what", ["the folder", "a library", "the record"])
def test_a_build_that_another_user_could_write_is_not_loaded(folder, what, monkeypatch):
    """It would be code of another user, run as us. Nothing is loaded, and the error names the place and the command."""
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
        loader._load_or_build(jit.source_dir(), directory, None, None)


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
