import io
import sys


def test_a_pipe_gets_tabs_and_bytes(cli, history) -> None:
    answer = cli("ls", history.root)

    rows = [line.split("\t") for line in answer.out.splitlines()]
    assert [row[0] for row in rows] == ["exp@250", "exp@300", "main@100", "main@200", "main@1000"]
    assert rows[2][1:3] == ["1006", "checkpoint-100"]
    assert rows[2][3].startswith("2026-02-03T04:")
    assert answer.code == 0


def test_a_ref_lists_the_files(cli, history) -> None:
    manifest = history.repository.manifest(history.repository.resolve("main@100"))

    rows = [line.split("\t") for line in cli("ls", history.root, "main@100").out.splitlines()]

    assert rows == [
        [one.path, str(one.size_bytes), one.component, one.kind.value, str(one.digest)]
        for one in manifest.files
    ]


def test_a_person_gets_columns(cli, history, monkeypatch, capsys) -> None:
    from ckptcoord.cli import main

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    for words, first in (
        ([], "exp@250    1006 B  checkpoint-250@exp  "),
        (["main@100"], "model.safetensors         984 B  model  tensors  "),
    ):
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        main(["ls", str(history.root), *words])
        assert screen.getvalue().startswith(first)


def test_programs_get_documents(cli, history) -> None:
    listed = cli("ls", history.root, "--json").json
    files = cli("ls", history.root, "best", "--json").json["data"]

    refs = [one["ref"] for one in listed["data"]["checkpoints"]]
    assert refs == ["exp@250", "exp@300", "main@100", "main@200", "main@1000"]
    assert listed["command"] == "ls"
    assert files["ref"] == "main@200"
    assert files["files"][0]["path"] == "model.safetensors"


def test_nothing_is_listed_of_an_empty_repository(cli, build) -> None:
    answer = cli("ls", build.root)

    assert (answer.code, answer.out, answer.err) == (0, "", "")
