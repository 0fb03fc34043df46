"""The files beside a model: what comes in with it goes out with it, also after training."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import ckptcoord
from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.core.refs import BranchName
from ckptcoord.errors import CorruptError, UnsafePathError
from ckptcoord.formats.beside import IMPORTED
from ckptcoord.formats.detect import find_source
from ckptcoord.formats.exporting import NOTE, Export, Target, export
from ckptcoord.formats.importing import plan_import, run_import
from ckptcoord.formats.model import FILES

GOLDEN = Path(__file__).parents[2] / "golden/hf"
SMALL = {
    "added.merges": b"",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}",
    "source.spm": bytes(range(256)),
    "tokenizer.json": b'{"a": 1}',
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def imported(tmp_path):
    """A repository with an import of a folder with `SMALL` in it."""
    shutil.copytree(GOLDEN / "one", tmp_path / "source")
    for name, data in SMALL.items():
        (tmp_path / "source" / name).write_bytes(data)
    bring(tmp_path / "source", tmp_path / "run")
    return tmp_path / "run"


def bring(path, root):
    source = find_source(path)
    return list(run_import(source, plan_import(source), root))


def exported(root, out, ref="latest", **wanted):
    repository = ckptcoord.open_repository(root)
    return export(repository, repository.resolve(ref), out, Export(to=Target.HF, **wanted))


def small_in(folder):
    """The files in it that are not of the model itself."""
    names = {"model.safetensors", "config.json", NOTE}
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.name not in names}


def train(root, step, state, branch="main", files=None, metadata=None):
    parts = [StateComponent("model", state, SharingPattern.GLOBAL, metadata=metadata or {})]
    if files is not None:
        parts.append(StateComponent(FILES, files, SharingPattern.GLOBAL))
    config = CoordinatorConfig(branch=branch)
    with CheckpointCoordinator(parts, output_dir=root, config=config) as coordinator:
        coordinator.save_checkpoint(step=step)


def trained(root, ref="main@0"):
    state = dict(ckptcoord.load(root, ref)["model"])
    return {name: tensor + 1 for name, tensor in state.items()}


def test_a_folder_goes_out_as_it_came_in(imported, tmp_path) -> None:
    report = exported(imported, tmp_path / "out")

    assert small_in(tmp_path / "out") == SMALL
    config = (tmp_path / "out/config.json").read_bytes()
    assert config == (tmp_path / "source/config.json").read_bytes()
    assert report.notes == ()
    assert {name for name, _ in report.files} == {*SMALL, "config.json", "model.safetensors", NOTE}


def test_transformers_opens_model_and_tokenizer(tmp_path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    shutil.copytree(GOLDEN / "sharded", tmp_path / "source")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path / "source")
    bring(tmp_path / "source", tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "out", max_shard_size=3000)

    was, now = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
    assert now.get_vocab() == was.get_vocab()
    assert now("b")["input_ids"] == was("b")["input_ids"]
    was, now = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("source", "out"))
    assert now.config.to_dict() | {"_name_or_path": ""} == was.config.to_dict() | {
        "_name_or_path": ""
    }
    there, here = was.state_dict(), now.state_dict()
    assert all(torch.equal(here[name], value) for name, value in there.items())


def test_what_was_trained_from_it_has_them_too(imported, tmp_path) -> None:
    train(imported, 5, trained(imported))
    repository = ckptcoord.open_repository(imported)
    repository.fork(BranchName("exp"), repository.resolve("main@5").checkpoint_id, writer="0" * 32)
    train(imported, 6, trained(imported), branch="exp")
    train(imported, 7, trained(imported), branch="exp")

    report = exported(imported, tmp_path / "out", "exp@7")

    assert small_in(tmp_path / "out") == SMALL
    config = (tmp_path / "out/config.json").read_bytes()
    assert config == (tmp_path / "source/config.json").read_bytes()
    (note,) = report.notes
    assert "config.json" in note
    assert "as of main@0" in note


def test_a_model_of_other_shapes_has_another_config(imported, tmp_path) -> None:
    train(imported, 5, {"w": torch.ones(3)})

    report = exported(imported, tmp_path / "out")

    assert not (tmp_path / "out/config.json").exists()
    assert small_in(tmp_path / "out") == SMALL
    assert "config.json" not in report.notes[0].split(", ")


def test_other_components_and_files_of_ones_own_have_none(imported, tmp_path) -> None:
    exported(imported, tmp_path / "out", component=FILES)
    assert small_in(tmp_path / "out") == {}
    mine = {"tokenizer.json": torch.ones(3, dtype=torch.uint8)}
    train(tmp_path / "other", 1, {"w": torch.ones(3)}, files=mine)
    report = exported(tmp_path / "other", tmp_path / "none")
    assert small_in(tmp_path / "none") == {}
    assert report.notes == ()


def test_a_folder_given_goes_before_them(imported, tmp_path) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "given/config.json").write_text("{}")

    exported(imported, tmp_path / "out", config_from=tmp_path / "given")

    assert small_in(tmp_path / "out") == {}


def test_an_export_comes_in_again(imported, tmp_path) -> None:
    exported(imported, tmp_path / "out")
    bring(tmp_path / "out", tmp_path / "second")
    exported(tmp_path / "second", tmp_path / "again")
    assert small_in(tmp_path / "again") == SMALL


@pytest.mark.parametrize(
    "name",
    [
        *("../tokenizer.json", "/etc/x.json", "a/b.json", "a\0.json", "a\\b.json", "\x1b.json"),
        *("", "..", "x" * 300 + ".json", "\ud800.json"),
    ],
    ids=ascii,
)
def test_a_name_that_leads_elsewhere_is_refused(tmp_path, name) -> None:
    files = {name: torch.ones(3, dtype=torch.uint8)}
    train(tmp_path / "run", 1, {"w": torch.ones(3)}, files=files, metadata={IMPORTED: {}})
    train(tmp_path / "run", 2, {"w": torch.ones(3)})
    for ref in ("main@1", "main@2"):
        with pytest.raises(UnsafePathError):
            exported(tmp_path / "run", tmp_path / "out", ref)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", ["config.json", NOTE, "model.safetensors.index.json", "run.py"])
def test_what_an_export_has_itself_or_is_no_tokenizers_is_not_taken(tmp_path, name) -> None:
    files = {name: torch.ones(3, dtype=torch.uint8), "vocab.txt": torch.ones(1, dtype=torch.uint8)}
    train(tmp_path / "run", 1, {"w": torch.ones(3)}, files=files, metadata={IMPORTED: {}})
    exported(tmp_path / "run", tmp_path / "out")
    assert small_in(tmp_path / "out") == {"vocab.txt": b"\1"}


@pytest.mark.parametrize(
    "files",
    [
        [torch.ones(1, dtype=torch.uint8)],
        {"vocab.txt": torch.ones(1)},
        {"vocab.txt": torch.ones(1, 1, dtype=torch.uint8)},
        {"vocab.txt": "text"},
        {7: torch.ones(1, dtype=torch.uint8)},
    ],
    ids=["list", "floats", "matrix", "text", "number"],
)
def test_files_that_are_none_are_corrupt(tmp_path, files) -> None:
    train(tmp_path / "run", 1, {"w": torch.ones(3)}, files=files, metadata={IMPORTED: {}})
    with pytest.raises(CorruptError, match="file"):
        exported(tmp_path / "run", tmp_path / "out")


def test_an_import_that_is_damaged_does_not_stop_what_came_of_it(imported, tmp_path) -> None:
    train(imported, 5, {"w": torch.ones(3)})
    (imported / "checkpoint-0/checkpoint_manifest.json").write_text(f'"{IMPORTED}"')

    report = exported(imported, tmp_path / "out")

    assert small_in(tmp_path / "out") == {}
    assert "left out what was beside the model" in report.notes[0]
    with pytest.raises(CorruptError):
        exported(imported, tmp_path / "first", "main@0")


def test_indices_of_other_weights_are_no_small_files(tmp_path) -> None:
    shutil.copytree(GOLDEN / "one", tmp_path / "source")
    (tmp_path / "source/flax_model.msgpack.index.json").write_text("{}")
    (tmp_path / "source/model.fp16.safetensors.index.json").write_text("{}")
    (done,) = bring(tmp_path / "source", tmp_path / "run")
    assert sorted(done.plan.left_out) == [
        "flax_model.msgpack.index.json: no part of a checkpoint that is known",
        "model.fp16.safetensors.index.json: no part of a checkpoint that is known",
    ]
