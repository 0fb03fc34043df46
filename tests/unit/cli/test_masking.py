"""A token in the argument list, the environment or an exception is in no output and no file."""

import os
import subprocess
import sys

import pytest
import torch
from tests.unit.cli.hub import serving

import ckptcoord
from ckptcoord.cli.bearer import Token
from ckptcoord.errors import ConfigError

TOKEN = "planted-4f6c1e9a77d04b2c8e51"
OTHER = "another-0b7d5e3c1a9f86420dc4"
MERGE = ["--average", "main@1", "main@2", "--into", "mean"]
CHILD = ["--", "true", f"--token={OTHER}"]


@pytest.fixture
def hub():
    with serving(TOKEN) as hub:
        yield hub


def _process(program, *words, env=None):
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},  # noqa: TID251 (a child's)
    )


BUG = """
import sys, threading
import ckptcoord.cli.account as account
def bug(*_, **__):
    thread = threading.Thread(target=fail, args=["a thread"])
    thread.start(); thread.join()
    fail("the command")
def fail(where):
    try:
        raise ValueError("Invalid header value b'Bearer %(token)s'")
    except ValueError as error:
        raise RuntimeError(f"{where}: https://me:%(token)s@host, {sys.argv}") from error
account.user_of = bug
from ckptcoord.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize("by", ["argv", "environment"])
def test_no_traceback_holds_the_token(hub, by) -> None:
    words = ["--token", TOKEN] if by == "argv" else []
    env = {} if by == "argv" else {"CKPTCOORD_TOKEN": TOKEN}

    run = _process(BUG % {"token": TOKEN}, "login", "--verify-url", hub.url, *words, env=env)

    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 4
    assert "RuntimeError: a thread: https://***@host" in run.stderr
    assert TOKEN not in run.stdout + run.stderr


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize(
    "words",
    [
        ["log", TOKEN],
        ["log", "--branch", TOKEN],
        ["inspect", f"main@{TOKEN}"],
        ["inspect", f"https://me:{TOKEN}@host/run"],
        ["ls", "--repo", f"/{TOKEN}"],
        ["gc", "--grace", TOKEN],
        [TOKEN],
        ["whoami", TOKEN],
        ["log", f"--{TOKEN}"],
        ["verify", "--token", TOKEN],
    ],
)
def test_no_command_shows_the_token_of_the_environment(history, cli, words, as_json, monkeypatch):
    monkeypatch.setenv("CKPTCOORD_TOKEN", TOKEN)
    monkeypatch.chdir(history.root)

    answer = cli(*words, *as_json)

    assert answer.code not in (0, None)
    assert TOKEN not in answer.out + answer.err
    assert "***" in answer.out + answer.err or "--token" in words


def test_what_a_repository_says_of_the_token_is_masked(build, cli, monkeypatch) -> None:
    build.commit(1, message="by hand")
    commit = build.commit(2, metrics={TOKEN: 1.0})
    monkeypatch.setenv("CKPTCOORD_TOKEN", TOKEN)

    for words in (["log"], ["log", "--json"], ["inspect"], ["inspect", "--json"]):
        answer = cli(*words, "-C", build.root)
        assert (answer.code, TOKEN in answer.out) == (0, False)
    assert TOKEN in str(commit.metrics)


def test_a_token_has_no_repr() -> None:
    assert TOKEN not in f"{Token(TOKEN)} {[Token(TOKEN)]!r}"
    with pytest.raises(ConfigError) as caught:
        Token(f"{TOKEN} and more", "--token")
    assert TOKEN not in f"{caught.value} {vars(caught.value)}"


def test_no_file_that_a_command_writes_holds_a_token(tmp_path, cli, monkeypatch) -> None:
    monkeypatch.setenv("CKPTCOORD_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    note = f"train.py --hub_token {OTHER}, {TOKEN}, https://me:{OTHER}@host"
    for value in (1.0, 3.0):
        ckptcoord.save({"w": torch.full((4,), value)}, tmp_path / "space/run", keep=9, message=note)

    said = [
        cli(*words, *more)
        for words, more in [
            (["workspace", "init", "space"], ["-d", note]),
            (["repo", "init", "b", "--workspace", "space"], ["-d", note]),
            (["repo", "list", "--workspace", "space"], ["--json"]),
            (["config", "show", "-C", "space/run"], ["--origin"]),
            (["status", "-C", "space/run"], []),
            (["log", "-C", "space/run"], ["--graph"]),
            (["show", "-C", "space/run"], ["--json"]),
            (["tag", "-C", "space/run"], ["first", "main@1"]),
            (["merge", "-C", "space/run", "--component", "object"], [*MERGE, "-m", note]),
            (
                ["resume", "-C", "space/run", "main@2", "--dry-run"],
                ["--", "true", f"--token={OTHER}"],
            ),
            (["rm", "-C", "space/run", "main@1"], ["--force", "-y"]),
            (["verify", "-C", "space/run"], ["--all"]),
        ]
    ]

    assert [answer.code for answer in said] == [0] * len(said), said
    for answer in said:
        assert TOKEN not in answer.out + answer.err
        assert OTHER not in answer.out + answer.err
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 15
    for path, data in files.items():
        assert TOKEN.encode() not in data, path
        assert OTHER.encode() not in data, path
    assert any(b"--hub_token ***" in data for data in files.values())
