"""Where the compiled CPU kernels are kept: the user's cache, or a folder of the user's own where there is none."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from rrm_kernels import build

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="users have no number there")


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without HOME and without an entry in the list of users; returns where temporary files go."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_without_a_home_a_temporary_folder_is_taken_and_said(nobody: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = build._place_of("k.so")
    assert place == nobody / f"rrm_engine-{os.getuid()}" / "k.so"
    assert place.parent.stat().st_mode & 0o777 == 0o700
    assert str(place.parent) in caplog.text and "XDG_CACHE_HOME" in caplog.text
    place.touch()
    caplog.clear()
    assert build._place_of("k.so") == place
    assert not caplog.text


def test_a_folder_that_others_can_write_is_not_trusted(nobody: Path) -> None:
    shared = nobody / f"rrm_engine-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "k.so").touch()
    place = build._place_of("k.so")
    assert place.parent != shared and place.parent.stat().st_mode & 0o777 == 0o700
    shared.rename(nobody / "elsewhere")
    shared.symlink_to(nobody / "elsewhere")
    assert build._place_of("k.so").parent not in (shared, nobody / "elsewhere")


def test_a_cache_that_cannot_be_made(nobody: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build._place_of("k.so").is_relative_to(nobody)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert build._place_of("k.so") == tmp_path / "home" / ".cache" / "rrm_engine" / "k.so"


def test_a_library_in_a_cache_that_is_read_only_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = build._place_of("k.so")
    place.touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert build._place_of("k.so") == place
    assert not build._place_of("other.so").is_relative_to(tmp_path / "rrm_engine")
