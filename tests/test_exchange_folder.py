"""Where input is kept that is too large for memory: one folder for each worker, which does not outlive it for long."""

import fcntl
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from worker.cluster.folder import LOCK, PREFIX, ExchangeFolder

# A worker that has kept something, and says so; it ends when its input does.
WORKER = """
import sys
from pathlib import Path
from worker.cluster.folder import ExchangeFolder

folder = ExchangeFolder(Path(sys.argv[1])).new()
folder.mkdir()
(folder / "0-0-0.arrow").write_text("rows")
print(folder, flush=True)
sys.stdin.read()
"""


def test_it_is_made_when_it_is_needed_and_deleted_when_it_is_closed(tmp_path: Path) -> None:
    folder = ExchangeFolder(tmp_path)
    assert not list(tmp_path.iterdir())
    first, second = folder.new(), folder.new()
    assert first != second
    assert first.parent == second.parent
    assert first.parent.parent == tmp_path
    first.mkdir()
    folder.close()
    folder.close()
    assert not list(tmp_path.iterdir())
    assert folder.new().parent != first.parent
    folder.close()


def test_without_a_parent_it_is_in_the_systems_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = ExchangeFolder(None)
    assert folder.new().parent.parent == tmp_path
    folder.close()


def test_that_of_a_worker_that_was_killed_is_deleted_by_the_next_one_and_a_live_ones_is_not(tmp_path: Path) -> None:
    here = ExchangeFolder(tmp_path)
    own = here.new().parent
    command = (sys.executable, "-c", WORKER, str(tmp_path))
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as live,
    ):
        assert killed.stdout is not None
        assert live.stdout is not None
        abandoned, kept = Path(killed.stdout.readline().strip()), Path(live.stdout.readline().strip())
        killed.kill()
        killed.wait()
        assert (abandoned / "0-0-0.arrow").exists()
        following = ExchangeFolder(tmp_path)
        fresh = following.new().parent
        assert not abandoned.parent.exists()
        assert (kept / "0-0-0.arrow").read_text() == "rows"
        assert {path.name for path in tmp_path.iterdir()} == {own.name, kept.parent.name, fresh.name}
        live.kill()
    following.close()
    here.close()


def test_what_others_have_put_there_stays(tmp_path: Path) -> None:
    foreign, locked = tmp_path / "worker-other", tmp_path / f"{PREFIX}without-a-lock"
    foreign.mkdir()
    locked.mkdir()
    (tmp_path / f"{PREFIX}file").touch()
    folder = ExchangeFolder(tmp_path)
    folder.new()
    folder.close()
    assert {path.name for path in tmp_path.iterdir()} == {foreign.name, locked.name, f"{PREFIX}file"}


def test_one_that_another_worker_deleted_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = fcntl.flock
    deleted: list[Path] = []

    def lock_late(file: int, operation: int) -> None:
        if not deleted:
            (folder,) = tmp_path.iterdir()
            deleted.append(folder)
            shutil.rmtree(folder)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    folder = ExchangeFolder(tmp_path)
    new = folder.new()
    assert new.parent != deleted[0]
    assert (new.parent / LOCK).exists()
    folder.close()
