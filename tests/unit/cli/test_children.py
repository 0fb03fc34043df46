"""`resume` and `fork`: everything is checked first, and then the command is on its own."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ckptcoord.cli.child import run_child
from ckptcoord.core.refs import BranchName
from ckptcoord.plan.commit import branches, head

if TYPE_CHECKING:
    from collections.abc import Callable

ENVIRON = os.environ  # noqa: TID251 (a launcher)
PROGRAM = [sys.executable, "-m", "ckptcoord.cli"]
# Says when it is ready, then which signals come until a while after the first, and exits with 75.
COUNTS = """
import os, signal, sys, time
if sys.argv[1] == "apart":
    os.setsid()
came = []
for number in (1, 2, 3, 10, 12, 15):
    signal.signal(number, lambda number, _: came.append(number) or os.write(1, b"got\\n"))
os.write(1, b"ready\\n")  # no print, which a signal's own must not enter
end = time.monotonic() + 20
while not came and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.4)
print(*came, flush=True)
sys.exit(75)
"""
NO_BRANCH = ["nosuch", "./nosuch", "/etc/passwd", "/", "", "a\0b", "x" * 10_000, "x/" * 5_000]


@pytest.fixture(autouse=True)
def _unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in ENVIRON if one.startswith("CKPTCOORD_")]:
        monkeypatch.delenv(name)


def start(history, *words: object, **options: object) -> subprocess.Popen[str]:
    said = [*PROGRAM, *map(str, words[:2]), "-C", str(history.root), "--", *map(str, words[2:])]
    return subprocess.Popen(said, stdout=subprocess.PIPE, text=True, **options)


def script(tmp_path: Path, text: str, mode: int = stat.S_IRWXU) -> str:
    file = tmp_path / "script"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


# --- what the command is told --------------------------------------------------------------------


@pytest.fixture
def heard(cli, tmp_path) -> Callable[..., dict[str, str]]:
    """What a command finds in its environment."""

    def run(*words: object) -> dict[str, str]:
        found = tmp_path / "environment"
        assert cli(*words, "--", "sh", "-c", f"env > {found}").code == 0
        lines = (line.split("=", 1) for line in found.read_text().splitlines())
        return {line[0]: line[1] for line in lines if line[0].startswith("CKPTCOORD_")}

    return run


def test_a_command_hears_where_to_go_on(heard, history, monkeypatch) -> None:
    monkeypatch.setenv("CKPTCOORD_SEED", "3")  # of an outer fork
    monkeypatch.setenv("CKPTCOORD_AUTOCOMMIT", "50")
    number = history.repository.state().number

    assert heard("resume", "latest", "-C", history.root) == {
        "CKPTCOORD_REPO": str(history.root),
        "CKPTCOORD_BRANCH": "exp",
        "CKPTCOORD_RESUME_REF": "exp@300",
        "CKPTCOORD_RESUME_SINCE": str(number),
        "CKPTCOORD_AUTOCOMMIT": "50",
    }


def test_in_a_workspace_it_hears_both_names(cli, heard, history, monkeypatch) -> None:
    space = history.root.parent
    cli("workspace", "init", space)
    monkeypatch.chdir(space)

    told = heard("fork", "main@200", "new", "--seed", 7, "-C", "run")

    assert (told["CKPTCOORD_WORKSPACE"], told["CKPTCOORD_REPO"]) == (str(space), "run")
    assert (told["CKPTCOORD_BRANCH"], told["CKPTCOORD_RESUME_REF"]) == ("new", "main@200")
    assert told["CKPTCOORD_SEED"] == "7"
    assert "CKPTCOORD_RESET" not in told


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--weights-only",), "weights-only"),
        (("--reset-scheduler", "--reset-optimizer"), "optimizer,scheduler"),
        (("--weights-only", "--reset-optimizer"), "optimizer,weights-only"),
    ],
)
def test_a_command_hears_what_to_begin_anew(heard, history, options, said) -> None:
    told = heard("fork", "main@200", "new", *options, "-C", history.root)
    assert told["CKPTCOORD_RESET"] == said


def test_a_branch_that_only_begins_somewhere_is_gone_on_with(cli, heard, history) -> None:
    assert cli("fork", "main@200", "new", "-C", history.root).code == 0

    told = heard("resume", "new", "-C", history.root)

    assert (told["CKPTCOORD_BRANCH"], told["CKPTCOORD_RESUME_REF"]) == ("new", "main@200")


def test_a_checkpoints_folder_is_a_ref(heard, history, monkeypatch) -> None:
    monkeypatch.chdir(history.root)
    told = heard("resume", "./checkpoint-1000")
    assert told["CKPTCOORD_RESUME_REF"] == "main@1000"


def test_a_folder_says_which_repository_from_anywhere(heard, history, monkeypatch) -> None:
    monkeypatch.chdir(history.root.parent)
    assert heard("resume", "run/checkpoint-300@exp")["CKPTCOORD_RESUME_REF"] == "exp@300"
    assert heard("resume", "run")["CKPTCOORD_RESUME_REF"] == "exp@300"
    assert heard("fork", "run/checkpoint-100", "new")["CKPTCOORD_BRANCH"] == "new"


@pytest.mark.parametrize("option", ["--reset-optimizer", "--weights-only", "--seed=7"])
def test_what_begins_anew_needs_a_command_to_be_told(cli, history, option) -> None:
    answer = cli("fork", "main@200", "new", "-C", history.root, option)
    assert answer.code == 2
    assert BranchName("new") not in branches(history.repository.state())


# --- what is refused, before anything is changed -------------------------------------------------


@pytest.mark.parametrize("command", NO_BRANCH)
def test_a_command_that_cannot_be_started_leaves_no_branch(cli, history, command) -> None:
    before = history.repository.state()
    answer = cli("fork", "main@200", "new", "-C", history.root, "--", command, "x")
    assert answer.code == 127
    assert answer.err.startswith("error[CC072]: cannot start ")
    assert "Traceback" not in answer.err
    assert history.repository.state() == before


@pytest.mark.parametrize(
    "text", ["echo no interpreter is named\n", "#!/no/such/interpreter\n", "\x7fELF and no more"]
)
def test_a_file_that_the_system_will_not_start_leaves_no_branch(
    cli, history, tmp_path, text
) -> None:
    before = history.repository.state()
    answer = cli("fork", "main@200", "new", "-C", history.root, "--", script(tmp_path, text))
    assert (answer.code, answer.err[:13]) == (127, "error[CC072]:")
    assert history.repository.state() == before


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("main", 1),
        ("exp", 1),
        ("best", 2),
        ("checkpoint-5", 2),
        ("a/b", 2),
        ("..", 2),
        ("a\0b", 2),
        ("x" * 10_000, 2),
        ("a.lock", 2),
    ],
)
def test_a_branch_that_is_there_or_can_be_none_is_refused(
    cli, history, tmp_path, name, code
) -> None:
    before = history.repository.state()
    answer = cli("fork", "main@200", name, "-C", history.root, "--", "touch", tmp_path / "ran")
    assert answer.code == code
    assert "Traceback" not in answer.err
    assert len(answer.err) < 500
    assert history.repository.state() == before
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["resume", "fork"])
@pytest.mark.parametrize(
    ("ref", "code"),
    [("mian", 12), ("main@7", 12), ("a\0b", 2), ("x" * 10_000, 2), ("a/../b", 12), ("", 2)],
)
def test_a_ref_that_is_none_is_refused(cli, history, tmp_path, command, ref, code) -> None:
    words = [command, ref, *(["new"] if command == "fork" else []), "-C", history.root]
    answer = cli(*words, "--", "touch", tmp_path / "ran")
    assert answer.code == code
    if code == 12:
        assert "Nearest: " in answer.err
    assert not (tmp_path / "ran").exists()


def test_a_resume_without_a_command_says_how(cli, history) -> None:
    answer = cli("resume", "main", "-C", history.root)
    assert answer.code == 2
    assert "ckptcoord resume main -- python train.py" in answer.err


def test_a_damaged_checkpoint_is_found_before_the_command_runs(cli, history, tmp_path) -> None:
    manifest = history.root / "checkpoint-1000/checkpoint_manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    answer = cli("resume", "main", "-C", history.root, "--", "touch", tmp_path / "ran")
    assert answer.code == 13
    assert not (tmp_path / "ran").exists()


def test_an_error_is_json_too_and_the_words_of_the_command_are_not_ours(cli, history) -> None:
    answer = cli("resume", "main@7", "-C", history.root, "--json", "--", "true")
    assert answer.json["error"]["code"] == "CC012"
    process = subprocess.run(
        [*PROGRAM, "resume", "main@7", "--frob", "--", "x", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stdout) == (2, "")


def test_with_json_stdout_has_one_object_when_the_command_has_ended(history) -> None:
    said = ["sh", "-c", "echo its own; exit 3"]
    for words in (["resume", "exp"], ["fork", "main@200", "new"]):
        process = subprocess.run(
            [*PROGRAM, *words, "-C", str(history.root), "--json", "--", *said],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (process.returncode, process.stderr) == (3, "its own\n")
        document = json.loads(process.stdout)
        assert (document["schema_version"], document["command"]) == (1, words[0])
        data = document["data"]
        assert (data["exit_code"], data["command"]) == (3, said)
        assert data["environment"]["CKPTCOORD_BRANCH"] == data["branch"]
        assert data["repository"] == str(history.root)


def test_of_many_forks_onto_one_branch_one_runs(history, tmp_path) -> None:
    words = ["fork", "main@200", "new", "-C", history.root, "--", "touch"]
    jobs = [
        subprocess.Popen(
            [*PROGRAM, *map(str, words), str(tmp_path / f"ran{at}")], stderr=subprocess.PIPE
        )
        for at in range(4)
    ]
    said = [job.communicate(timeout=60)[1] for job in jobs]
    assert sorted(job.returncode for job in jobs) == [0, 1, 1, 1], said
    assert sum(b"error[CC023]: branch 'new' exists already" in one for one in said) == 3
    (won,) = [at for at, job in enumerate(jobs) if not job.returncode]
    assert [one.name for one in tmp_path.glob("ran*")] == [f"ran{won}"]


# --- an older step -------------------------------------------------------------------------------


def test_an_older_step_is_refused_with_the_two_answers(cli, history, tmp_path) -> None:
    before = history.repository.state()
    answer = cli("resume", "main@200", "-C", history.root, "--", "touch", tmp_path / "ran")
    assert answer.code == 1
    assert "ckptcoord fork main@200 NAME" in answer.err
    assert "ckptcoord resume main@200 --rewind" in answer.err
    assert history.repository.state() == before
    assert not (tmp_path / "ran").exists()


def test_a_rewind_retires_what_came_after_and_keeps_its_files(cli, history) -> None:
    history.commit(1100)
    answer = cli("resume", "main@200", "-C", history.root, "--rewind", "-y", "--", "true")
    assert answer.code == 0
    state = history.repository.state()
    assert head(state, BranchName()).checkpoint_id.step == 200
    assert head(state, BranchName("exp")).checkpoint_id.step == 300
    assert {"checkpoint-1000", "checkpoint-1100"} <= state.retired.keys()
    assert (history.root / "checkpoint-1000").is_dir()
    history.commit(1000)  # the step is free again
    assert history.repository.resolve("main@1000").path.startswith("checkpoint-1000.")


def test_a_dry_run_shows_it_and_changes_nothing(cli, history) -> None:
    before = history.repository.state()
    words = ["resume", "main@200", "-C", history.root, "--rewind", "--dry-run"]
    answer = cli(*words, "--json", "--", "train", "it")
    assert answer.code == 127  # it would not start
    answer = cli(*words, "--json", "--", "true", "it")
    assert answer.json["data"]["retire"] == ["main@1000"]
    assert answer.json["data"]["command"] == ["true", "it"]
    assert answer.json["data"]["environment"]["CKPTCOORD_RESUME_REF"] == "main@200"
    assert history.repository.state() == before


def test_nobody_to_ask_is_no_yes(cli, history) -> None:
    before = history.repository.state()
    answer = cli("resume", "main@200", "-C", history.root, "--rewind", "--", "true")
    assert (answer.code, history.repository.state()) == (2, before)


def test_a_command_that_cannot_be_started_rewinds_nothing(cli, history) -> None:
    before = history.repository.state()
    answer = cli("resume", "main@200", "-C", history.root, "--rewind", "-y", "--", "nosuch")
    assert (answer.code, history.repository.state()) == (127, before)


def test_a_tag_holds_what_a_rewind_would_retire(cli, history, tmp_path) -> None:
    history.tag("keep", 1000)
    before = history.repository.state()
    words = ["--rewind", "-y", "--", "touch", tmp_path / "ran"]
    answer = cli("resume", "main@200", "-C", history.root, *words)
    assert answer.code == 1
    assert "the tag 'keep'" in answer.err
    assert history.repository.state() == before
    assert not (tmp_path / "ran").exists()


# --- the command itself --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [("exit 0", 0), ("exit 3", 3), ("exit 75", 75), ("kill -TERM $$", 143), ("kill -KILL $$", 137)],
)
def test_its_exit_code_is_passed_on(history, text, code) -> None:
    process = start(history, "resume", "main", "sh", "-c", text)
    process.communicate(timeout=60)
    assert process.returncode == code


def test_it_has_our_streams_and_signals_as_they_were(history) -> None:
    text = "cat; grep -E 'Sig(Blk|Ign)' /proc/self/status"
    process = start(history, "resume", "main", "sh", "-c", text, stdin=subprocess.PIPE)
    out, _ = process.communicate("from stdin\n", timeout=60)
    said = out.split()
    assert said[:5] == ["from", "stdin", "SigBlk:", "0" * 16, "SigIgn:"]
    kept = {signal.SIGPIPE, signal.SIGXFSZ}  # which Python ignores, and the command does not
    ours = re.search(r"SigIgn:\s+(\w+)", Path("/proc/self/status").read_text())
    assert int(said[5], 16) == int(ours[1], 16) & ~sum(1 << (one - 1) for one in kept)


@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGINT, "here"),
        (signal.SIGTERM, "here"),
        (signal.SIGHUP, "here"),
        (signal.SIGUSR1, "here"),
        (signal.SIGINT, "apart"),
        (signal.SIGTERM, "apart"),
    ],
)
def test_a_signal_goes_on_to_it_once(history, number, where) -> None:
    process = start(history, "resume", "main", sys.executable, "-c", COUNTS, where)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert (out.split(), process.returncode) == (["got", str(int(number))], 75)


def test_what_a_terminal_sends_to_both_comes_once(history) -> None:
    child, terminal = pty.fork()
    if not child:
        words = [
            "resume",
            "main",
            "-C",
            str(history.root),
            "--",
            sys.executable,
            "-c",
            COUNTS,
            "here",
        ]
        os.execv(sys.executable, [*PROGRAM, *words])
    seen = until(terminal, b"ready")
    os.kill(child, signal.SIGSTOP)  # the command has handled it before we look at ours
    os.write(terminal, b"\x03")
    seen += until(terminal, b"got")
    os.kill(child, signal.SIGCONT)
    seen += until(terminal, None)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 75
    assert seen.replace(b"^C", b"").split() == [b"ready", b"got", b"2"]


def until(terminal: int, word: bytes | None) -> bytes:
    """What a terminal shows until it shows this, or until its end."""
    seen = b""
    try:
        while word is None or word not in seen:
            assert select.select([terminal], [], [], 60)[0], seen
            more = os.read(terminal, 1000)
            if not more:
                break
            seen += more
    except OSError:  # Linux says so that the other end is closed
        assert word is None, seen
    return seen


def test_nohup_stays_nohup(history) -> None:
    ignoring = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); "
    ignoring += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    words = ["-C", str(history.root), "--", "sh", "-c", "echo ready; sleep 0.5; exit 4"]
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring, *PROGRAM[1:], "resume", "main", *words],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 4


@pytest.mark.parametrize("at", range(20))
def test_what_cannot_be_prepared_ends_the_command_before_it_does_anything(tmp_path, at) -> None:
    def prepare() -> None:
        time.sleep(0.005)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run_child("/bin/touch", ["touch", f"{tmp_path}/ran"], dict(ENVIRON), prepare=prepare)
    assert not (tmp_path / "ran").exists()


def test_it_runs_only_when_all_is_prepared(tmp_path) -> None:
    words = ["test", "-e", f"{tmp_path}/prepared"]

    def prepare() -> None:
        time.sleep(0.05)
        (tmp_path / "prepared").touch()

    assert run_child("/usr/bin/test", words, dict(ENVIRON), prepare=prepare) == 0
