"""The CLI as a process: what it imports, how it ends."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ckptcoord.cli import main

CLI = [sys.executable, "-m", "ckptcoord.cli"]
IMPORTED = """
import json, sys
from ckptcoord.cli import main
code = main(sys.argv[1:])
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})), file=sys.stderr)
sys.exit(code)
"""


def _imports(*words: object) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", IMPORTED, *map(str, words)],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(run.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["log"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["log", "--json"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["log", "--timing"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["log", "--graph"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["log", "--retired"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["tag"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["branch"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["show"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["du"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["ls"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["inspect"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["inspect", "--json"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["inspect", "--tensors"], {"torch", "numpy", "numba", "pydantic", "yaml", "rich"}),
        (["verify"], {"torch", "numpy", "numba", "yaml", "rich"}),
    ],
)
def test_an_answer_waits_for_no_library_that_it_does_not_need(history, words, unwanted) -> None:
    command, *options = words

    assert not _imports(command, history.root, *options) & unwanted


def test_a_pipe_whose_reader_has_gone_ends_it_quietly(build) -> None:
    for step in range(3):
        build.commit(step, message="x" * 90)
    reading, writing = os.pipe()
    os.close(reading)

    for words in (["log"], ["log", "--json"], ["verify", "--all"]):
        run = subprocess.run(
            [*CLI, *words, "-C", str(build.root)],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
        )
        assert (run.returncode, run.stderr) == (141, b"")
    os.close(writing)


def test_an_interrupted_command_exits_with_130_and_no_traceback(build) -> None:
    commit = build.commit(1)
    shard = build.root / commit.path / "rng.rank00000.state.json"
    shard.unlink()
    program = (
        # Whoever started the tests in the background has it ignored, and children inherit that.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time, ckptcoord.repo.verify as v\n"
        "v._FileCheck._document = lambda self: (print('here', flush=True), time.sleep(60))\n"
        "from ckptcoord.cli import main\n"
        "sys.exit(main(['verify', sys.argv[1]]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(build.root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)

    assert (process.returncode, err) == (130, "interrupted\n")


IMPORTING = """
import sys
import ckptcoord.cli

def tell(frame, event, arg):
    if frame.f_code.co_name == "import_module":
        sys.setprofile(None)
        print("ready", flush=True)

sys.setprofile(tell)
sys.exit(ckptcoord.cli.main())
"""


@pytest.mark.parametrize("after_s", [0.0, 0.05, 0.1])
def test_an_interrupt_while_it_still_imports_is_no_traceback(build, after_s) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", IMPORTING, "diff", "main@1", "main@2"],
        cwd=build.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout.readline() == "ready\n"
    time.sleep(after_s)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert (run.returncode, said) == (130, "interrupted\n")


@pytest.mark.parametrize("words", [["log"], ["diff", "main@1", "main@2"]])
def test_an_interrupt_while_a_command_is_imported_is_said(monkeypatch, capsys, words) -> None:
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptcoord.cli.app.import_module", interrupted)
    assert main(words) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_data_and_errors_have_streams_of_their_own(tmp_path) -> None:
    run = subprocess.run(
        [*CLI, "log", "-C", str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert (run.returncode, run.stdout) == (10, "")
    assert run.stderr.startswith("error[CC020]: ")


def test_hundreds_of_commits_are_all_shown(build) -> None:
    import dataclasses

    first = build.commit(1)
    for step in range(2, 400):
        build.repository.log.append(
            lambda _, step=step: dataclasses.replace(
                first,
                checkpoint_id=dataclasses.replace(first.checkpoint_id, step=step),
                path=f"checkpoint-{step}",
            )
        )

    run = subprocess.run([*CLI, "log", str(build.root)], capture_output=True, check=True)

    assert run.stdout.count(b"\n\n") == 398


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    ("words", "code"),
    [("log -C .", 0), ("log -C nowhere", 10), ("gc -C .", 2), ("login", 2), ("--help", 0)],
)
def test_streams_that_are_closed_are_no_bug(build, closed, words, code) -> None:
    build.commit(1)
    shell = f"{sys.executable} -m ckptcoord.cli {words} {closed}"

    run = subprocess.run(
        ["sh", "-c", shell], cwd=build.root, capture_output=True, text=True, check=False
    )

    assert (run.returncode, "Traceback" in run.stdout + run.stderr) == (code, False)


@pytest.mark.parametrize("words", ["log -C .", "log --json -C .", "--help", "log -h", "--version"])
def test_a_full_disk_under_stdout_is_14(build, words) -> None:
    build.commit(1)
    with open("/dev/full", "w") as full:  # noqa: PTH123 (it is no file)
        run = subprocess.run(
            [*CLI, *words.split()],
            cwd=build.root,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert run.returncode == 14
    assert run.stderr.startswith("error[CC014]: stdout: write failed: No space left on device\n")
    assert "Traceback" not in run.stderr
