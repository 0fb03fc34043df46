"""`ckptcoord bisect`: sessions, commands and metrics."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ckptcoord.cli.bisectfile import SessionFile
from ckptcoord.core.entries import Retire
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.errors import CommandError

SCRIPT = "import os, sys; sys.exit({codes}[os.environ['CKPTCOORD_RESUME_REF']])"


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def runs(build):
    """Ten checkpoints, the loss goes up at main@600; a branch that began at main@400."""
    for step in range(100, 1100, 100):
        loss = {} if step == 700 else {"loss": 2.0 if step < 600 else 4.0}
        build.commit(step, metrics=loss)
    build.fork("exp", 400)
    build.commit(450, "exp", metrics={"loss": 2.5})
    build.commit(500, "exp", metrics={"loss": 9.0})
    return build


def by_codes(codes) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(codes=codes)]


def test_a_bisection_by_hand(cli, runs) -> None:
    repo = ("--repo", runs.root)
    begun = cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *repo)
    assert begun.code == 0
    assert begun.out == f"next\tmain@600\t{runs.root}/checkpoint-600\n"
    assert "9 checkpoints after main@100 may be the first bad one: about 4 steps left" in begun.err

    assert cli("bisect", "bad", *repo).out.startswith("next\tmain@400\t")
    assert cli("bisect", "good", *repo).out.startswith("next\tmain@500\t")
    skipped = cli("bisect", "skip", *repo)
    assert skipped.code == 3
    assert [line.split("\t")[:2] for line in skipped.out.splitlines()] == [
        ["maybe", "main@500"],
        ["maybe", "main@600"],
    ]
    done = cli("bisect", "good", "main@500", *repo)
    assert (done.code, done.out) == (0, f"first-bad\tmain@600\t{runs.root}/checkpoint-600\n")
    assert "main@600 is the first bad checkpoint; main@500 is good" in done.err
    assert "loss 4" in done.err

    log = cli("bisect", "log", *repo).out.splitlines()
    assert log[:2] == ["good\tmain@100\tthe start", "bad\tmain@1000\tthe start"]
    assert log[2] == "bad\tmain@600\tthe user"
    assert log[-1] == done.out.strip()


def test_a_command_judges(cli, runs) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *repo)
    codes = {f"main@{step}": 0 if step < 700 else 3 for step in range(100, 1100, 100)}
    codes["main@600"] = 125

    done = cli("bisect", "run", *repo, *by_codes(codes))

    assert done.code == 3, "main@600 was skipped, and main@700 is bad"
    assert [line.split("\t")[1] for line in done.out.splitlines()] == ["main@600", "main@700"]
    assert "main@600: skip (exit code 125)" in done.err
    assert "main@700: bad (exit code 3)" in done.err


@pytest.mark.parametrize("code", [1, 124, 126, 127])
def test_exit_codes_up_to_127_are_bad(cli, runs, code) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@300", "--bad", "main@500", *repo)

    done = cli("bisect", "run", *repo, "--json", *by_codes({"main@400": code})).json["data"]

    assert done["first_bad"] == "main@400"
    assert done["verdicts"][-1] == {"ref": "main@400", "verdict": "bad", "why": f"exit code {code}"}


@pytest.mark.parametrize("end", ["sys.exit(128)", "sys.exit(255)", "os.kill(os.getpid(), 9)"])
def test_a_command_that_breaks_stops_the_search_and_says_nothing(cli, runs, end) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *repo)
    before = cli("bisect", "log", *repo).out

    stopped = cli("bisect", "run", *repo, sys.executable, "-c", f"import os, sys; {end}")

    assert stopped.code == 1
    assert "main@600, which says nothing of it" in stopped.err
    assert cli("bisect", "log", *repo).out == before


def test_a_command_gets_ref_and_path_and_its_own_options(cli, runs, tmp_path, monkeypatch) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@300", "--bad", "main@500", *repo)
    runs.fork("bisect-main-400", 400)
    monkeypatch.setenv("CKPTCOORD_SEED", "7")
    said = tmp_path / "said.json"
    code = (
        "import json, os, sys; print('not the answer'); "
        "told = [os.environ['CKPTCOORD_' + name] for name in ('REPO', 'BRANCH')]; "
        f"json.dump([sys.argv[1:], *told], open({str(said)!r}, 'w')); "
        "assert 'CKPTCOORD_SEED' not in os.environ"
    )

    done = cli("bisect", "run", *repo, sys.executable, "-c", code, "--lr", "x{ref}", "{path}")

    assert done.out == f"first-bad\tmain@500\t{runs.root}/checkpoint-500\n"
    words, given, branch = json.loads(said.read_text())
    assert branch == "bisect-main-400-2", "the other one is taken"
    assert words == ["--lr", "xmain@400", f"{runs.root}/checkpoint-400"]
    assert given == str(runs.root)


def test_a_command_that_cannot_be_started_is_no_verdict(cli, runs) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *repo)

    for word in ("/nowhere/at/all", "a\0b", str(runs.root)):
        answer = cli("bisect", "run", *repo, word)
        assert answer.code == CommandError.exit_code, answer.err
        assert answer.err.splitlines()[1].startswith("error[")
    assert cli("bisect", "log", *repo).out.count("\n") == 3


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], "main@600"),
        (["--good", "main@300", "--bad", "main@900"], "main@600"),
        (["--bad", "main@700", "--absent", "bad"], "main@600"),
    ],
)
def test_a_metric_answers_at_once(cli, runs, options, found) -> None:
    bad = [] if "--bad" in options else ["--bad", "main@1000"]
    words = ["bisect", "start", "--metric", "loss > 3", *options, *bad, "--repo", runs.root]

    done = cli(*words)

    assert done.code == 0
    assert done.out.startswith(f"first-bad\t{found}\t")


def test_a_metric_is_followed_across_a_fork(cli, runs) -> None:
    data = cli("bisect", "start", "--metric", "loss > 3", "--json", "--repo", runs.root).json[
        "data"
    ]

    assert (data["bad"], data["first_bad"], data["steps_left"]) == ("exp@500", "exp@500", 0)
    assert data["good"] == "exp@450"
    assert {one["why"] for one in data["verdicts"]} >= {"loss 2.5", "the start"}


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--good", "main@100"], "--bad: is missing"),
        (["--bad", "main@100"], "--good: is missing"),
        (["--good", "main@500", "--bad", "main@100"], "main@100 comes before main@500"),
        (["--good", "main@500", "--bad", "main@500"], "is the good one, too"),
        (["--good", "main@500", "--bad", "exp@500"], "They part at main@400"),
        (["--metric", "loss > 3", "--bad", "main@200"], "main@200 is good by"),
        (["--metric", "loss > 3", "--good", "main@600"], "main@600 is bad by"),
        (["--metric", "loss > 1", "--bad", "main@200"], "none is good by"),
        (["--metric", "loss", "--bad", "main@200"], "For example"),
        (["--metric", "loss > 3", "--absent", "x"], "--absent: is 'x'"),
        (["--good", "a\nb", "--bad", "main@500"], "ref"),
        (["--good", "x" * 10_000, "--bad", "main@500"], "ref"),
        (["--good", "..", "--bad", "main@500"], "Nearest"),
        (["--good", "", "--bad", "main@500"], "is empty"),
        (["--good", "main@1.lock", "--bad", "main@500"], "ref"),
    ],
)
def test_what_cannot_be_begun_is_refused_with_the_reason(cli, runs, words, why) -> None:
    answer = cli("bisect", "start", *words, "--repo", runs.root)

    assert answer.code in (2, 12)
    assert why in answer.err
    assert cli("bisect", "log", "--repo", runs.root).code == 2


def test_one_search_at_a_time_but_for_another_file(cli, runs, tmp_path) -> None:
    start = ("bisect", "start", "--good", "main@100", "--bad", "main@1000", "--repo", runs.root)
    assert cli(*start).code == 0
    again = cli(*start)
    assert again.code == 2
    assert "has begun already" in again.err
    assert cli(*start, "--state", tmp_path / "mine/a b.json").code == 0
    assert (
        cli("bisect", "bad", "--repo", runs.root, "--state", tmp_path / "mine/a b.json").code == 0
    )
    assert cli("bisect", "log", "--repo", runs.root).out.count("\n") == 3, "the other one's"


def test_a_repository_that_is_searched_is_not_written_to(cli, runs) -> None:
    def tree():
        return {path: path.stat().st_mtime_ns for path in Path(runs.root).rglob("*")}

    before = tree()
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", "--repo", runs.root)
    cli("bisect", "bad", "--repo", runs.root)

    assert tree() == before


def test_reset_asks_and_says_what_it_would_do(cli, runs) -> None:
    repo = ("--repo", runs.root)
    assert "no bisection has begun" in cli("bisect", "reset", *repo).err
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *repo)

    assert "nobody to ask" in cli("bisect", "reset", *repo).err
    assert "2 verdicts would be forgotten" in cli("bisect", "reset", "--dry-run", *repo).err
    assert cli("bisect", "log", *repo).code == 0
    assert cli("bisect", "reset", "-y", "--json", *repo).json["data"]["deleted"] is True
    assert cli("bisect", "log", *repo).code == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"format_version": 2}', b"\xff\xfe", b'{"format_version": 1, "line": []}'],
)
def test_a_damaged_file_is_named_and_can_be_forgotten(cli, runs, content) -> None:
    repo = ("--repo", runs.root)
    file = Path(SessionFile(runs.root, None).path)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)

    answer = cli("bisect", "log", *repo)
    assert answer.code == 13
    assert str(file) in answer.err
    assert "`ckptcoord bisect reset`" in answer.err
    assert "verify" not in answer.err
    assert cli("bisect", "reset", "-y", *repo).code == 0
    assert not file.exists()


def test_a_repository_whose_name_is_no_text_is_searched_too(cli, runs, tmp_path) -> None:
    folder = tmp_path / os.fsdecode(b"runs\xff")
    shutil.copytree(runs.root, folder)
    began = cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", "--repo", folder)
    assert began.code == 0, began.err
    assert cli("bisect", "log", "--repo", folder).code == 0


def test_a_file_of_more_bytes_than_any_bisection_can_be_forgotten_too(cli, runs) -> None:
    file = Path(SessionFile(runs.root, None).path)
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(1 << 40)

    answer = cli("bisect", "reset", "-y", "--repo", runs.root)

    assert answer.code == 0, answer.err
    assert str(file) in answer.err
    assert not file.exists()


def test_what_is_named_and_is_no_bisection_here_is_never_deleted(cli, runs, tmp_path) -> None:
    script, folder = tmp_path / "train.py", tmp_path / "runs"
    script.write_text("print(1)")
    folder.mkdir()
    (folder / "kept").touch()
    other = tmp_path / "other.json"
    cli(
        "bisect",
        "start",
        "--good",
        "main@100",
        "--bad",
        "main@1000",
        "--state",
        other,
        "-C",
        runs.root,
    )
    other.write_text(other.read_text().replace(runs.root.name, "elsewhere"))

    for state in (script, folder, other):
        answer = cli("bisect", "reset", "-y", "--repo", runs.root, "--state", state)
        assert answer.code not in (0, 3)
        assert state.exists()
    assert (folder / "kept").exists()


def test_the_file_of_another_repository_is_refused(cli, runs, tmp_path) -> None:
    file = tmp_path / "it.json"
    common = ("--repo", runs.root, "--state", file)
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *common)
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"repository": "/elsewhere"}))

    answer = cli("bisect", "good", *common)

    assert answer.code == 13
    assert "is of the repository /elsewhere" in answer.err


def test_what_is_retired_meanwhile_is_passed_over(cli, runs) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@400", "--bad", "main@600", *repo)
    one = CheckpointId(BranchName("main"), 500)
    runs.repository.log.append(lambda _: Retire(writer="a" * 32, checkpoint_ids=(one,)))

    answer = cli("bisect", "log", *repo)

    assert answer.code == 0
    assert answer.out.splitlines()[-1].startswith("first-bad\tmain@600\t")
    assert "main@500 cannot be tried any more" in answer.err
    assert cli("bisect", "bad", *repo).code == 2
    assert cli("bisect", "bad", "main@500", *repo).code == 12


def test_lineage_goes_on_behind_what_was_retired_and_swept(cli, runs) -> None:
    gone = [CheckpointId(BranchName("main"), step) for step in (200, 300, 500)]
    gone += [CheckpointId(BranchName("exp"), 450)]
    runs.repository.log.append(lambda _: Retire(writer="a" * 32, checkpoint_ids=tuple(gone)))
    repo = ("--repo", runs.root)
    start = ("bisect", "start", "--good", "main@100", "--bad", "exp@500", "--json", *repo)
    retired = cli(*start).json["data"]
    assert cli("bisect", "reset", "-y", *repo).code == 0
    swept = cli("gc", runs.root, "--grace", "0s", "-y", "--json").json["data"]

    assert len(swept["delete"]) == 4
    assert cli(*start).json["data"] == retired
    assert retired["answers"] == ["main@400", "exp@500"]


@pytest.mark.parametrize("state", ["", "..", "/", "a\0b", "a\0b/c", "x" * 300, "/proc/no/such"])
def test_a_bad_state_file_is_an_error(cli, runs, state) -> None:
    answer = cli("bisect", "log", "--repo", runs.root, "--state", state)

    assert answer.code in (1, 2, 13)
    assert answer.err.startswith("error[")


def test_to_look_makes_no_folder(cli, runs, tmp_path) -> None:
    assert "no bisection of" in cli("bisect", "log", "--repo", runs.root).err
    assert "no bisection has begun" in cli("bisect", "reset", "-y", "--repo", runs.root).err
    assert not (tmp_path / "state").exists()


def test_no_home_is_no_traceback(cli, runs, monkeypatch) -> None:
    def none() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setattr(Path, "home", none)

    answer = cli("bisect", "log", "--repo", runs.root)

    assert answer.code == 2
    assert "--state" in answer.err


def test_a_command_must_be_given(cli, runs) -> None:
    for words in (["run"], ["run", "--"]):
        answer = cli("bisect", *words)
        assert (answer.code, answer.out) == (2, "")
        assert "Missing argument" in answer.err


KILLS = """
import os, signal, sys, time
ref = os.environ["CKPTCOORD_RESUME_REF"]
if ref == "main@400":
    os.kill(os.getppid(), {signal})
    time.sleep(1)
sys.exit(int(ref.split("@")[1]) >= 500)
"""


def in_a_process(*words) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "ckptcoord.cli", "bisect", *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(("signal", "code"), [("signal.SIGKILL", -9), ("signal.SIGTERM", 1)])
def test_a_kill_leaves_what_was_found(cli, runs, signal, code) -> None:
    repo = ("--repo", runs.root)
    cli("bisect", "start", "--good", "main@100", "--bad", "main@1000", *repo)
    program = KILLS.format(signal=signal)

    killed = in_a_process("run", *repo, sys.executable, "-c", program)

    assert killed.returncode == code, killed.stderr
    assert killed.stdout == ""
    log = cli("bisect", "log", *repo).out.splitlines()
    assert log[-2:] == ["bad\tmain@600\texit code 1", f"next\tmain@400\t{runs.root}/checkpoint-400"]
    on = in_a_process("run", *repo, sys.executable, "-c", program.replace("main@400", "none"))
    assert (on.returncode, on.stdout.split("\t")[:2]) == (0, ["first-bad", "main@500"])


TRIES = """
import sys, torch
from ckptcoord import CheckpointEngine
model = torch.nn.Linear(2, 2)
with CheckpointEngine.attach(model, torch.optim.SGD(model.parameters())) as engine:
    bad = bool(model.bias[0] > 5)
sys.exit(bad)
"""


def test_a_script_that_resumes_is_judged_by_what_it_finds(cli, tmp_path) -> None:
    from ckptcoord import CheckpointEngine

    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    with CheckpointEngine.attach(model, optimizer, workspace=tmp_path, repo="gpt") as engine:
        for step in range(1, 6):
            torch.nn.init.constant_(model.bias, 9.0 if step > 3 else 1.0)
            engine.commit(step)
    repo = ("--repo", tmp_path / "gpt")
    cli("bisect", "start", "--good", "main@1", "--bad", "main@5", *repo)

    done = in_a_process("run", *repo, sys.executable, "-c", TRIES)

    assert done.stdout.startswith("first-bad\tmain@4\t"), done.stderr
    assert "note: the command has begun bisect-main-3, bisect-main-4" in done.stderr


def test_help_has_examples(cli) -> None:
    assert "bisect run" in cli("bisect", "--help").out
    for name in ("start", "good", "bad", "skip", "run", "log", "reset"):
        assert "Examples:" in cli("bisect", name, "--help").out
