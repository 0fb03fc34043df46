"""What the user sees when something is wrong: codes, causes, help; never a traceback."""

import dataclasses
import io
import json
import sys

import pytest

from ckptcoord.cli import main
from ckptcoord.cli.errors import error_document, error_lines
from ckptcoord.cli.output import Output, wants_color
from ckptcoord.cli.text import Painter
from ckptcoord.codec.digest import blake3_digest
from ckptcoord.errors import ConfigError, CorruptError, RefNotFoundError, StorageError

PLAIN = Painter(enabled=False)


def _forge(build, change) -> None:
    """A commit of a manifest that somebody wrote by hand, with its right digest in the log."""
    commit = build.commit(1)
    folder = build.root / commit.path
    folder.rename(build.root / "checkpoint-2")
    path = build.root / "checkpoint-2/checkpoint_manifest.json"
    document = json.loads(path.read_bytes())
    document.update(checkpoint_id="checkpoint-2", step=2)
    data = change(document)
    path.write_bytes(data)
    build.repository.log.append(
        lambda state: dataclasses.replace(
            commit,
            checkpoint_id=dataclasses.replace(commit.checkpoint_id, step=2),
            path="checkpoint-2",
            manifest_digest=blake3_digest(data),
        )
    )


@pytest.mark.parametrize("command", ["inspect", "verify", "ls"])
def test_a_newer_manifest_asks_for_an_upgrade(cli, build, command) -> None:
    _forge(build, lambda document: json.dumps(document | {"format_version": 2}).encode())

    answer = cli(command, build.root, "main@2")

    assert answer.code == 1
    assert "error[CC042]" in answer.out + answer.err
    assert "format version 2 is newer than 1" in answer.out + answer.err
    assert "help: Upgrade: pip install -U ckptcoord" in answer.out + answer.err


@pytest.mark.parametrize(
    "change",
    [
        lambda document: b"\x1b[2J",
        lambda document: json.dumps(document | {"\x1b[2J": 1}).encode(),
        lambda document: json.dumps(document | {"world_size": 10**9}).encode(),
        lambda document: json.dumps(document | {"message": "\ud800"}).encode(),
        lambda document: json.dumps(
            document | {"files": [document["files"][0] | {"path": "../../etc/passwd\x1b"}]}
        ).encode(),
    ],
    ids=["no-json", "unknown-field", "huge-world", "surrogate", "path"],
)
def test_a_hostile_manifest_is_corrupt_and_moves_no_cursor(cli, build, change) -> None:
    _forge(build, change)

    for command in ("inspect", "verify", "ls"):
        answer = cli(command, build.root, "main@2")
        said = answer.out + answer.err
        assert answer.code == 13
        assert "checkpoint-2/checkpoint_manifest.json: " in said
        assert said.replace("\n", "").isprintable()


def test_names_in_a_manifest_cannot_drive_the_terminal(cli, build) -> None:
    _forge(
        build,
        lambda document: json.dumps(
            document
            | {
                "message": "a\x1b[2Jb",
                "metrics": {"\x9bloss": 1.0},
                "ckptcoord_version": "1\r0",
                "training_args_hash": "\x07",
            }
        ).encode(),
    )

    answer = cli("inspect", build.root, "main@2")

    assert answer.code == 0
    assert answer.out.replace("\n", "").isprintable()
    assert r"message    a\x1b[2Jb" in answer.out


def test_a_damaged_log_is_corrupt(cli, history) -> None:
    entry = history.root / ".ckptcoord/log/00000000000000000003.json"
    entry.write_bytes(entry.read_bytes()[:-20])

    for command in ("log", "inspect", "verify", "ls"):
        answer = cli(command, history.root)
        assert answer.code == 13
        assert "error[CC013]: .ckptcoord/log/00000000000000000003.json: " in answer.err
        assert "help: " in answer.err


def test_a_newer_repository_asks_for_an_upgrade(cli, build) -> None:
    (build.root / ".ckptcoord/repo.yaml").write_text("format_version: 2\n")

    answer = cli("log", build.root)

    assert answer.code == 1
    assert answer.err.startswith("error[CC042]: ")


@pytest.mark.parametrize("text", ["a: &a b", "- [", "format_version: true", "\x00"])
def test_a_marker_that_is_no_marker_is_corrupt(cli, build, text) -> None:
    (build.root / ".ckptcoord/repo.yaml").write_text(text)

    assert cli("log", build.root).code == 13


def test_a_marker_that_was_edited_by_hand_is_read(cli, build) -> None:
    (build.root / ".ckptcoord/repo.yaml").write_text("# mine\nformat_version: 1\n")

    assert cli("log", build.root).code == 0


@pytest.mark.parametrize("command", ["log", "inspect", "verify", "ls"])
def test_a_program_reads_errors_where_it_reads_data(cli, tmp_path, command) -> None:
    answer = cli(command, "-C", tmp_path, "--json")

    assert answer.err == ""
    assert answer.json == {
        "schema_version": 1,
        "command": command,
        "error": {
            "code": "CC020",
            "type": "RepositoryNotFoundError",
            "exit_code": 10,
            "what": f"no ckptcoord repository at {tmp_path}",
            "help": "Name the folder that holds .ckptcoord (the trainer's output_dir)",
            "causes": [],
            "facts": {"path": str(tmp_path), "nearest": [], "variable": ""},
        },
    }
    assert answer.code == 10


@pytest.mark.parametrize(
    ("words", "command", "why"),
    [
        (["frob", "--json"], None, "No such command 'frob'"),
        (["log", "--frob", "--json"], "log", "No such option: --frob"),
        (["log", "a", "b", "--json"], "log", "unexpected extra argument"),
        (["--json"], None, "No such option: --json"),
        (["bisect", "start", "--frob", "--json"], "bisect start", "No such option: --frob"),
    ],
)
def test_usage_errors_are_errors_like_others(cli, words, command, why) -> None:
    answer = cli(*words)

    assert answer.code == 2
    assert answer.json["command"] == command
    assert answer.json["error"]["code"] == "CC002"
    assert why in answer.json["error"]["what"]
    text = cli(*words[:-1] or ["--frob"])
    assert text.code == 2
    assert text.err.startswith("error[CC002]: ckptcoord")
    assert text.err.endswith("--help`\n")


def test_an_option_before_its_command_is_told_where_it_belongs(cli) -> None:
    error = cli("--json", "log").json["error"]
    assert error["what"].startswith("ckptcoord: No such option: --json")
    assert error["help"] == "Options stand behind the command: `ckptcoord log --help`"


def test_no_words_show_the_help_and_are_a_usage_error(cli) -> None:
    answer = cli()

    assert answer.code == 2
    assert answer.out.startswith("Usage: ckptcoord")


def test_help_and_version_are_answers(cli) -> None:
    assert cli("--version").out == "ckptcoord 0.1.0\n"
    for words in (["-h"], ["log", "--help"], ["inspect", "-h"], ["verify", "-h"], ["ls", "-h"]):
        answer = cli(*words)
        assert answer.code == 0
        assert answer.out.startswith("Usage: ckptcoord")


def test_causes_are_shown_once_and_escaped() -> None:
    error = CorruptError(path="b", why="cannot be read (a: read failed: no luck)")
    error.__cause__ = StorageError(operation="read", path="a", why="no luck")
    error.__cause__.__cause__ = OSError(5, "Input/output \x1berror")

    lines, document = error_lines(error, PLAIN), error_document(error)

    assert lines == [
        "error[CC013]: b: cannot be read (a: read failed: no luck)",
        r"cause: OSError: [Errno 5] Input/output \x1berror",
        "help: Run `ckptcoord verify`, or load an earlier checkpoint (`ckptcoord log`)",
    ]
    assert document["causes"] == ["OSError: [Errno 5] Input/output \x1berror"]


def test_a_cause_of_ours_is_shown_as_it_says_itself() -> None:
    error = ConfigError(field="x", why="y")
    error.__cause__ = RefNotFoundError(ref="z")
    error.__cause__.__cause__ = error

    assert error_lines(error, PLAIN) == ["error[CC002]: x: y", "cause: no checkpoint 'z'"]


def test_a_bug_keeps_its_traceback(cli, history, monkeypatch) -> None:
    from ckptcoord.cli import log

    def broken(*_args, **_kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr(log, "open_repository", broken)

    with pytest.raises(KeyError, match="a bug"):
        cli("log", history.root)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_is_130(history, monkeypatch, capsys, as_json) -> None:
    from ckptcoord.cli import log

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(log, "open_repository", interrupted)

    assert main(["log", str(history.root), *(["--json"] * as_json)]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


class Gone(io.StringIO):
    """A pipe whose reader has gone."""

    encoding = "utf-8"

    def write(self, _text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("words", [["log"], ["log", "--json"], ["log", "--frob", "--json"]])
def test_a_broken_pipe_is_141_and_silent(history, monkeypatch, capsys, words) -> None:
    monkeypatch.chdir(history.root)
    monkeypatch.setattr(sys, "stdout", Gone())

    assert main(words) == 141
    assert capsys.readouterr().err == ""


def test_help_into_a_broken_pipe_is_141_too(monkeypatch, capsys) -> None:
    before = sys.stdout, sys.stderr
    monkeypatch.setattr(sys, "stdout", Gone())

    try:
        assert main(["--help"]) == 141
    finally:
        sys.stdout, sys.stderr = before  # typer wraps both


class Full(io.StringIO):
    """A disk without space."""

    encoding = "utf-8"

    def write(self, _text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_full_disk_behind_stdout_is_an_error(history, monkeypatch, capsys, option) -> None:
    monkeypatch.setattr(sys, "stdout", Full())

    code = main(["log", str(history.root), *option])

    assert code == 14
    assert "error[CC014]: stdout: write failed: No space left on device" in capsys.readouterr().err


def test_what_stdout_cannot_encode_is_written_out(history, build, monkeypatch) -> None:
    build.commit(7, message="größe 模型")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)

    assert main(["log", str(build.root), "-n", "1"]) == 0
    assert main(["inspect", str(build.root)]) == 0

    said = stream.buffer.getvalue().decode("latin-1")
    assert r"größe \u6a21\u578b" in said
    assert "\n|-- model" in said


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environ", "on_terminal", "in_pipe"),
    [
        ({"TERM": "xterm"}, True, False),
        ({}, False, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "0", "TERM": "xterm"}, False, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colours_follow_the_environment(environ, on_terminal, in_pipe) -> None:
    assert wants_color(Terminal(), environ) is on_terminal
    assert wants_color(io.StringIO(), environ) is in_pipe


def test_a_terminal_gets_indented_json(monkeypatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)

    Output("x", as_json=True).data([1])

    assert screen.getvalue().startswith('{\n  "schema_version": 1,\n')


def test_a_name_of_pages_is_shown_by_its_beginning(cli, history) -> None:
    for words in (["log", "-n", "x" * 10_000], ["log", "-n", "\0" * 10_000], ["ls", "x" * 10_000]):
        answer = cli(*words, "-C", history.root)

        assert answer.code in (2, 12)
        assert len(answer.err) < 600
        assert "x" * 50 in answer.err or r"\x00" * 20 in answer.err


def test_a_command_that_is_misspelt_is_answered_with_the_nearest(cli) -> None:
    assert "help: Nearest: log" in cli("lgo").err
    assert "help: See `ckptcoord --help`" in cli("x" * 10_000).err
    assert "help: See `ckptcoord log --help`" in cli("log", "--nope").err
