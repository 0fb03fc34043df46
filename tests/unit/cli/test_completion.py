"""`ckptcoord completion`, and what a real bash makes of it."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from ckptcoord.cli.completion import GROUPS, NO_REFS, SCRIPTS, candidates

PROGRAM = f'ckptcoord() {{ {shlex.quote(sys.executable)} -m ckptcoord.cli "$@"; }}'
bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")


@pytest.fixture
def here(history, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".hidden").mkdir()
    return history


def offered(line: str) -> list[str]:
    return list(candidates(line))


def test_commands_and_options_come_from_their_declarations(here) -> None:
    assert offered("ckptcoord sh") == ["show"]
    assert {"log", "show", "tag", "branch", "rm", "cat", "completion"} <= set(offered("ckptcoord "))
    assert offered("ckptcoord log --gr") == ["--graph"]
    assert "--json" in offered("ckptcoord show run main@1 --")
    assert offered("ckptcoord bisect go") == ["good"]
    assert offered("ckptcoord completion z") == ["zsh"]


def test_refs_come_from_the_log(here) -> None:
    assert offered("ckptcoord show run ") == [
        "latest", "best", "exp", "main", "exp@300", "main@1000",
    ]  # fmt: skip
    assert offered("ckptcoord show run main@") == [
        "main@100", "main@200", "main@1000", "main@latest",
    ]  # fmt: skip
    assert offered("ckptcoord inspect -C run ex") == ["exp", "exp@300"]
    assert offered("ckptcoord inspect --repo=run be") == ["best"]
    assert offered("ckptcoord show run checkpoint-2") == ["checkpoint-250@exp", "checkpoint-200"]
    assert offered("ckptcoord rm run main@100 main@2") == ["main@200"]


def test_names_are_offered_where_only_names_can_stand(here) -> None:
    assert offered("ckptcoord tag run -d ") == ["best"]
    assert offered("ckptcoord branch run -d ") == ["exp", "main"]
    assert offered("ckptcoord log -C run --branch ") == ["exp", "main"]
    assert offered("ckptcoord log -C run --branch=m") == ["--branch=main"]


def test_repositories_and_folders_are_offered(here, tmp_path) -> None:
    assert offered("ckptcoord log ") == ["run"]
    assert offered("ckptcoord log n") == []
    assert offered("ckptcoord log -C n") == ["notes/"]
    assert offered("ckptcoord log -C ") == ["notes/", "run/"]
    assert offered(f"ckptcoord show {tmp_path}/r") == [f"{tmp_path}/run/"]
    assert offered("ckptcoord show ./run/checkpoint-1000") == ["./run/checkpoint-1000/"]


def test_repositories_of_the_workspace_are_offered_by_name(here, tmp_path, monkeypatch) -> None:
    from ckptcoord.repo.workspace import init_workspace

    init_workspace(tmp_path)
    assert offered("ckptcoord log -C r") == ["run/"]
    monkeypatch.chdir(tmp_path / "notes")
    assert offered("ckptcoord log -C r") == ["run"]
    assert offered("ckptcoord show -C run be") == ["best"]


def test_what_stands_behind_two_dashes_is_no_word_of_ours(here) -> None:
    assert offered("ckptcoord resume main@100 -- m") == []


@pytest.mark.parametrize(
    "line",
    ["", "ckptcoord", "x", "ckptcoord nothing ", "ckptcoord show 'ru", "ckptcoord show \\",
     "ckptcoord show a\0b", "ckptcoord show a\0b/", "ckptcoord -C /nowhere show ",
     "ckptcoord show -C notes m", "ckptcoord show ../", "ckptcoord " + "x" * 10_000,
     "ckptcoord show " + "/x" * 5_000, "ckptcoord bisect nothing x", "ckptcoord log --x=y",
     "ckptcoord log --branch=x", "ckptcoord log --repo=x"],
)  # fmt: skip
def test_no_line_is_an_error(here, cli, line) -> None:
    answer = cli("__complete", line)

    assert (answer.code, answer.err) == (0, "")


def test_a_damaged_log_offers_nothing(here, cli) -> None:
    for entry in (here.root / ".ckptcoord/log").iterdir():
        entry.write_bytes(b"x")

    assert offered("ckptcoord show run ") == []


def test_the_commands_that_take_refs_are_known() -> None:
    from typer.main import get_command

    from ckptcoord.cli.app import app

    group = get_command(app)
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        assert hasattr(command, "commands") == (name in GROUPS), name
        if name not in GROUPS:
            metavars = "".join(one.metavar or "" for one in command.params)
            assert ("REF" in metavars) == (name not in NO_REFS), name


def test_refs_wait_for_no_library_that_they_do_not_need(here) -> None:
    program = (
        "import sys; from ckptcoord.cli import main; main(sys.argv[1:]);"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program, "__complete", "ckptcoord show run main@1"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert answer.stdout == "main@100\nmain@1000\n"
    for name in ("typer", "numpy", "pydantic", "rich", "torch", "yaml"):
        assert f"'{name}'" not in answer.stderr


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_each_shell_has_its_script(cli, shell) -> None:
    answer = cli("completion", shell)

    assert (answer.code, answer.err) == (0, "")
    assert "ckptcoord __complete" in answer.out
    assert cli("completion", shell, "--json").json["data"]["script"] == answer.out
    if shutil.which(shell):
        check = subprocess.run(
            [shell, "-n"], input=answer.out, text=True, capture_output=True, check=False
        )
        assert (check.returncode, check.stderr) == (0, "")


def test_another_shell_is_a_usage_error(cli) -> None:
    assert cli("completion", "tcsh").code == 2
    assert cli("completion", "x" * 10_000).code == 2


@bash
@pytest.mark.parametrize(
    ("line", "replaced", "expected"),
    [
        ("ckptcoord sho", "sho", ["show"]),
        ("ckptcoord show run main@10", "@10", ["@100", "@1000"]),
        ("ckptcoord log -C run --branch=ma", "ma", ["main"]),
        ("ckptcoord log -C run --branch=", "", ["exp", "main"]),
        ("ckptcoord log -C no", "no", ["notes/"]),
    ],
)
def test_bash_gets_what_it_may_put_in_the_place_of_its_word(here, line, replaced, expected) -> None:
    script = "\n".join(
        [
            PROGRAM,
            SCRIPTS["bash"],
            f"COMP_LINE={shlex.quote(line)}; COMP_POINT={len(line)}",
            "compopt() { :; }",  # only where there is a completion under way
            f'_ckptcoord ckptcoord {shlex.quote(replaced)}; printf "%s\\n" "${{COMPREPLY[@]}}"',
        ]
    )
    answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)

    assert (answer.stderr, answer.stdout.split()) == ("", expected)


@bash
def test_a_tab_in_a_real_bash_completes_a_ref(here) -> None:
    terminal, theirs = pty.openpty()
    settings = {"PS1": "ready> ", "TERM": "dumb", "INPUTRC": "/dev/null", "HISTFILE": ""}
    with subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, **settings},  # noqa: TID251 (a child's)
    ) as shell:
        os.close(theirs)
        try:
            os.write(terminal, f'{PROGRAM}; eval "$(ckptcoord completion bash)"\n'.encode())
            os.write(terminal, b"echo set''up\n")
            _until(terminal, "setup\r\nready> ")
            os.write(terminal, b"ckptcoord show run exp@2\t")
            _until(terminal, "250 ")
            os.write(terminal, b"| head -n 1\n")
            _until(terminal, "exp@250  checkpoint-250@exp")
            os.write(terminal, b"ckptcoord log -C run --branch=e\t")
            _until(terminal, "xp ")
            os.write(terminal, b"-n 1 | head -n 1\n")
            _until(terminal, "exp@300 (latest, exp)")
        finally:
            shell.kill()
            os.close(terminal)


def _until(terminal: int, text: str) -> str:
    seen, deadline = "", time.monotonic() + 30
    while text not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {text!r} in {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen
