"""delrec/files.py: who may read what is written, and what the system does not allow as a sentence.

The tests run as any user: what another one is refused is asked of a process of another user where
this one is root, else of a patched system.
"""

import errno
import os
import stat
import tempfile
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from scripts import sentence

from delrec import files, runtime
from delrec.files import (
    described,
    must_be_writable,
    read_json,
    read_npy,
    read_tensors,
    why_not_writable,
)
from delrec.runtime import is_run, lock, write_json, write_npy, write_tensors, write_text

NOBODY = 54321  # a user without a name


def as_another_user(call, *args) -> str:
    """The sentence with which a call stops for another user, nothing where it does not stop."""
    if os.geteuid():
        pytest.skip("only root can start a process of another user")
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        said = "nothing was said"
        try:
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
            call(*args)
            said = ""
        except click.ClickException as refused:
            said = refused.message
        finally:
            os.write(writer, said.encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        return said.read()


def mode_of(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    """umask(mask) sets the umask until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_all_files_are_as_readable_as_the_umask_allows(umask, mask, tmp_path):
    umask(mask)
    write_tensors(tmp_path / "a.safetensors", {"x": torch.arange(3)})
    write_npy(tmp_path / "a.npy", np.arange(3))
    write_json(tmp_path / "a.json", {})
    write_text(tmp_path / "a.txt", "x")
    assert {mode_of(p) for p in tmp_path.iterdir()} == {0o666 & ~mask}
    assert load_file(tmp_path / "a.safetensors")["x"].tolist() == [0, 1, 2]


def test_a_folder_that_a_library_wrote_follows_the_umask(umask, tmp_path):
    umask(0o027)
    (tmp_path / "lm").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "lm" / name).write_text("x")
        (tmp_path / "lm" / name).chmod(0o600)
    files.follow_umask(tmp_path / "lm")
    assert {mode_of(p) for p in (tmp_path / "lm").iterdir()} == {0o640}


@pytest.mark.parametrize("n", range(3))
def test_a_file_that_may_not_be_read_is_no_file_to_be_made_again(n, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0o600)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(np, "load", refuse)
    monkeypatch.setattr("builtins.open", refuse)
    says = sentence([read_json, read_npy, read_tensors][n], path)
    assert f"{path} may not be opened by this user (mode 0600, owner " in says
    assert "again" not in says and "ask its owner" in says
    assert "may not be opened" in sentence(is_run, tmp_path)


@pytest.fixture
def open_folder():
    """A folder that every user sees into, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_another_user_is_told_whose_file_it_is(open_folder):
    path = open_folder / "a.safetensors"
    write_tensors(path, {"x": torch.arange(3)})
    assert as_another_user(read_tensors, path) == ""
    path.chmod(0o600)
    says = as_another_user(read_tensors, path)
    assert f"{path} may not be opened by this user (mode 0600, owner root)" in says
    path.chmod(0o644)
    open_folder.chmod(0o700)
    assert f"({open_folder} has mode 0700, owner root)" in as_another_user(read_tensors, path)
    open_folder.chmod(0o755)


def test_another_user_s_folder_is_refused_at_the_door(open_folder):
    new = open_folder / "runs" / "x"
    for refuse in (must_be_writable, lock):
        says = as_another_user(refuse, new)
        assert f"{new} cannot be written by this user" in says
        assert f"({open_folder} has mode 0755, owner root); name another folder" in says
    assert not (open_folder / "runs").exists()


def test_a_folder_that_cannot_be_made_is_known_before_the_work(tmp_path):
    (tmp_path / "file").write_text("x")
    assert why_not_writable(tmp_path / "new" / "er") is None and not (tmp_path / "new").exists()
    assert f"{tmp_path / 'file'} is no folder" in why_not_writable(tmp_path / "file" / "runs")


def test_a_full_disk_is_known_before_the_work(tmp_path, monkeypatch):
    class Full:
        def __init__(self, dir):
            pass

        def __enter__(self):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(files.tempfile, "TemporaryFile", Full)
    assert why_not_writable(tmp_path / "x") == (
        f"{tmp_path / 'x'} cannot be written: no space is left there; free some and run this again"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_the_system_does_not_allow_ends_a_script_with_a_sentence(number, tmp_path):
    @click.command(**described("A script."))
    def main():
        raise OSError(number, "as the system says it", str(tmp_path / "x.npy"))

    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1 and done.stderr.startswith(f"Error: {tmp_path / 'x.npy'} ")
    assert done.stderr.count("\n") == 1


def test_a_fault_of_the_program_stays_a_fault():
    @click.command(**described("A script."))
    def main():
        raise OSError(errno.EINVAL, "what is this")

    assert isinstance(CliRunner().invoke(main, []).exception, OSError)


@pytest.mark.parametrize("write", [write_json, write_npy, write_tensors])
def test_a_full_disk_while_writing_names_the_file_and_leaves_nothing(write, tmp_path, monkeypatch):
    value = {write_json: {}, write_npy: np.zeros(3), write_tensors: {"x": torch.zeros(3)}}[write]
    path = tmp_path / "a"

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as bad:
        write(path, value)
    assert bad.value.filename == str(path) and list(tmp_path.iterdir()) == []
    assert files.said_by_system(bad.value).startswith(f"{path} cannot be written: no space is left")


def test_the_room_of_a_mapped_file_is_set_aside_when_it_is_made(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    files.new_npy(path, np.int16, (1000, 50))[7] = 3
    assert np.load(path).sum() == 150
    if hasattr(os, "posix_fallocate"):
        assert path.stat().st_blocks * 512 >= 1000 * 50 * 2
    for number, said in ((errno.ENOSPC, "no space is left there"), (errno.EOPNOTSUPP, None)):

        def refuse(*_, number=number):
            raise OSError(number, "as the system says it")

        monkeypatch.setattr(files.os, "posix_fallocate", refuse, raising=False)
        path.unlink(missing_ok=True)
        if said is None:  # of a file system that cannot
            assert not files.new_npy(path, np.float32, (3, 2)).any() and path.exists()
            continue
        with pytest.raises(OSError) as bad:
            files.new_npy(path, np.float32, (3, 2))
        assert said in files.said_by_system(bad.value) and not path.exists()


def test_a_full_disk_in_safetensors_is_the_system_s_error(tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError) as bad:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    assert bad.value.errno == errno.ENOSPC


def test_a_user_without_a_home_has_a_cache_that_nobody_can_make(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    cache = runtime.cache_folder()
    says = why_not_writable(cache / "wheels")
    assert "HOME is not set" in says and "XDG_CACHE_HOME" in says
    with pytest.raises(OSError) as bad:
        cache.mkdir(parents=True)
    assert files.said_by_system(bad.value) == says
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert runtime.cache_folder() == Path("/somewhere/delrec")
