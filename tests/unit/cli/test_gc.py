import os
import secrets
import subprocess
import sys

import pytest

from ckptcoord.cli.text import bytes_text
from ckptcoord.core.entries import Retire
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.repo.verify import verify_checkpoint

WRITER = "a" * 32
DAYS = 86400


@pytest.fixture
def littered(history):
    """main@100 was retired long ago; two saves were killed, one of them just now."""
    ids = (CheckpointId(BranchName(), 100),)
    history.repository.log.append(lambda _: Retire(writer=WRITER, checkpoint_ids=ids))
    for age_s in (2 * DAYS, 0):
        folder = history.root / ".ckptcoord/staging" / secrets.token_hex(16)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(500))
        os.utime(folder, (folder.stat().st_mtime - age_s,) * 2)
    return history


def extent(build):
    """What goes of `littered`, in words."""
    sizes = [one.stat().st_size for one in (build.root / "checkpoint-100").iterdir()]
    return f"2 folders, {bytes_text(sum(sizes) + 500)}"


def staged(build):
    return sorted(one.name for one in (build.root / ".ckptcoord/staging").iterdir())


def files(build):
    return sorted(path for path in build.root.rglob("*"))


def rows(answer):
    return [line.split("\t") for line in answer.out.splitlines()]


def test_a_dry_run_shows_what_a_run_does_and_changes_nothing(cli, littered) -> None:
    before, goes = files(littered), extent(littered)

    dry = cli("gc", littered.root, "--dry-run")

    assert files(littered) == before
    assert (dry.code, dry.err) == (0, f"{goes} to delete; nothing was changed\n")
    verbs = [(verb, size, why) for verb, _, size, why in rows(dry)]
    assert verbs[0][0] == "delete"
    assert ("delete", "500", "abandoned save") in verbs
    assert [verb for verb, _, _ in verbs] == ["delete", "delete", "keep"]
    assert "under way" in verbs[2][2]

    done = cli("gc", littered.root, "-y")

    assert done.out == dry.out
    assert (done.code, done.err) == (0, f"{goes} deleted\n")
    assert not (littered.root / "checkpoint-100").exists()
    assert len(staged(littered)) == 1
    assert cli("gc", littered.root, "-y").err == "0 folders, 0 B deleted\n"
    for commit in littered.repository.state().commits.values():
        assert verify_checkpoint(littered.repository, commit).ok


def test_the_grace_keeps_what_was_retired_lately(cli, littered) -> None:
    years = cli("gc", littered.root, "--dry-run", "--grace", "5000w", "--json").json["data"]

    assert years["delete"] == []
    assert years["keep"][-1]["path"] == "checkpoint-100"
    assert "retired" in years["keep"][-1]["why"]
    for wrong in ("soon", "-1h", "5"):
        answer = cli("gc", littered.root, "--dry-run", f"--grace={wrong}")
        assert answer.code == 2
        assert "--grace" in answer.err


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_without_anybody_to_ask_it_deletes_nothing(cli, littered, words) -> None:
    before = files(littered)

    answer = cli("gc", littered.root, *words)

    assert answer.code == 2
    assert "-y" in (answer.json["error"]["help"] if words else answer.err)
    assert files(littered) == before


@pytest.mark.parametrize(("said", "gone"), [("y\n", True), ("yes\n", True), ("\n", False)])
def test_it_asks(cli, littered, monkeypatch, said, gone) -> None:
    class Keyboard:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return said

    monkeypatch.setattr(sys, "stdin", Keyboard())

    question = f"Delete {extent(littered)}? [y/N] "

    answer = cli("gc", littered.root)

    assert answer.code == 0
    assert answer.err.startswith(question)
    assert (littered.root / "checkpoint-100").exists() is not gone


def test_programs_get_what_was_done(cli, littered) -> None:
    dry = cli("gc", littered.root, "--dry-run", "--json").json["data"]
    done = cli("gc", littered.root, "-y", "--json").json["data"]

    assert (dry["dry_run"], done["dry_run"]) == (True, False)
    assert [one["deleted"] for one in dry["delete"]] == [False, False]
    assert [one["deleted"] for one in done["delete"]] == [True, True]
    for one in (*dry["delete"], *done["delete"]):
        del one["deleted"]
    assert dry["delete"] == done["delete"]
    assert (dry["keep"], dry["freed_bytes"]) == (done["keep"], done["freed_bytes"])
    assert done["grace_s"] == 3600
    assert done["failed"] == done["restore"] == []


def test_what_cannot_be_deleted_is_named_and_the_rest_goes(cli, littered, monkeypatch) -> None:
    from ckptcoord.errors import StorageError
    from ckptcoord.store.local import LocalStore

    move = LocalStore.move_dir

    def stubborn(self, source, target):
        if source == "checkpoint-100":
            raise StorageError(operation="rename", path=source, why="Permission denied")
        move(self, source, target)

    monkeypatch.setattr(LocalStore, "move_dir", stubborn)

    answer = cli("gc", littered.root, "-y")

    assert answer.code == 1
    assert "checkpoint-100 is still there:\nerror[CC040]: " in answer.err
    assert "1 folder, 500 B deleted" in answer.err
    again = cli("gc", littered.root, "-y", "--json")  # it has been swept: now by its folder's age
    assert again.code == 0
    assert "checkpoint-100" in [one["path"] for one in again.json["data"]["keep"]]


def test_a_checkpoint_that_was_left_aside_is_put_back(cli, history) -> None:
    aside = history.root / ".ckptcoord/staging" / f"{secrets.token_hex(16)}-swept"
    (history.root / "checkpoint-100").rename(aside)

    answer = cli("gc", history.root, "-y")

    assert rows(answer)[0][0] == "restore"
    assert (history.root / "checkpoint-100").is_dir()


def test_names_from_the_repository_do_not_drive_the_terminal(cli, history) -> None:
    (history.root / "checkpoint-5").mkdir()

    answer = cli("gc", history.root, "--dry-run")

    assert rows(answer) == [["keep", "checkpoint-5", "0", "no checkpoint of ckptcoord"]]


def test_it_waits_for_no_library_that_it_does_not_need(history) -> None:
    code = "import sys; from ckptcoord.cli import main; main(sys.argv[1:]); print(*sys.modules)"
    words = ["gc", "--dry-run", "-C", str(history.root)]
    run = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )

    unwanted = {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}
    assert not unwanted & set(run.stdout.splitlines()[-1].split())
