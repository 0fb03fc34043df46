"""Storage that is full, forbidden or out of descriptors: the same typed error on all ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.distributed.aftermath import ABORTED, check_sound, check_whole
from tests.distributed.launch import World

pytestmark = [pytest.mark.dist, pytest.mark.waits]
NOBODY = 65534
TIMEOUT_S = 20.0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a tmpfs here")
    subprocess.run(["mountpoint", "-q", str(mount)], check=True)
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.fixture
def public_dir():
    """A folder that another user can enter, as tmp_path is not."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def fill_up(filler):
    """Leave no room at all."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextmanager
def failing(world, **save):
    """A save that all ranks must report alike; gives what they said."""
    world.tell("save", **save)
    heard = world.hear(TIMEOUT_S)
    assert set(heard) == {0, 1, 2, 3}
    errors = [outcome.error for outcome in heard.values()]
    assert all(errors), errors
    assert all(error == errors[0] for error in errors), errors
    yield errors[0]


def test_a_full_disk_is_reported_on_all_ranks_and_the_next_save_works_once_there_is_room(
    tmp_path, small_disk
):
    repo = small_disk / "run"
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo))
        world.ask("save", step=1)
        filler = small_disk / "filler"
        filler.write_bytes(bytes(2 << 20))
        for rank in (1, 2):
            world.tell("grow", [rank], numbers=1 << 17)  # 1 MiB each
        world.hear(10, [1, 2])
        with failing(world, step=2) as error:
            assert error["type"] == ABORTED
            assert error["facts"]["phase"] == "vote"
            whys = error["facts"]["failures"]
            assert whys
            assert set(whys) <= {"0", "1", "2", "3"}
            assert all("No space left" in why for why in whys.values()), whys
        assert check_sound(repo) == [1]
        filler.unlink()
        world.ask("save", step=2)
        assert check_whole(world) == 2
    assert check_sound(repo) == [1, 2]


def test_a_disk_that_is_full_from_the_start_of_a_save_keeps_the_last_checkpoint(
    tmp_path, small_disk
):
    repo = small_disk / "run"
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo))
        world.ask("save", step=1)
        fill_up(small_disk / "filler")
        with failing(world, step=2) as error:
            assert "No space left" in error["what"]
        assert check_sound(repo) == [1]
        assert check_whole(world) == 1
        (small_disk / "filler").unlink()
        world.ask("save", step=2)
        assert check_whole(world) == 2


def test_a_revoked_permission_is_reported_on_all_ranks(tmp_path, public_dir):
    repo = public_dir / "run"
    repo.mkdir()
    os.chown(repo, NOBODY, NOBODY)
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo), uid=NOBODY)
        world.ask("save", step=1)
        for folder in (repo, repo / ".ckptcoord" / "staging"):
            folder.chmod(0o555)
            with failing(world, step=2) as error:
                assert "Permission denied" in error["what"]
            folder.chmod(0o755)
            assert check_sound(repo) == [1]
            assert check_whole(world) == 1
        world.ask("save", step=2)
        assert check_whole(world) == 2


def test_a_folder_that_cannot_be_written_is_refused_at_once_on_all_ranks(tmp_path, public_dir):
    with World(tmp_path) as world:
        world.tell("open", output_dir=str(public_dir / "run"), uid=NOBODY)
        heard = world.hear(TIMEOUT_S)
        for outcome in heard.values():
            assert outcome.kind == "OutputDirError"
            assert outcome.facts["why"] == "Permission denied"
    assert not (public_dir / "run").exists()


def test_a_rank_without_file_descriptors_is_named_on_all_ranks(tmp_path):
    repo = tmp_path / "run"
    with World(tmp_path) as world:
        world.ask("open", output_dir=str(repo))
        world.ask("save", step=1)
        world.tell("limit_files", [3], spare=0)
        world.hear(10, [3])
        with failing(world, step=2) as error:
            assert error["type"] == ABORTED
            assert set(error["facts"]["failures"]) == {"3"}
            assert "Too many open files" in error["facts"]["failures"]["3"]
        world.tell("limit_files", [3], spare=None)
        world.hear(10, [3])
        world.ask("save", step=2)
        assert check_whole(world) == 2
    assert check_sound(repo) == [1, 2]
