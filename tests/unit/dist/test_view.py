"""A repository to look into from Python."""

from __future__ import annotations

import contextlib
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import ckptcoord
from ckptcoord import CheckpointCoordinator, CoordinatorConfig, SharingPattern, StateComponent
from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.core.entries import Fork
from ckptcoord.core.refs import BranchName, CheckpointId, TagName
from ckptcoord.dist.sharded import Sharded
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    CorruptError,
    InvalidNameError,
    RefNotFoundError,
    RepositoryNotFoundError,
    TensorNotFoundError,
)

PER_RANK, GLOBAL = SharingPattern.PER_RANK, SharingPattern.GLOBAL
WRITER = "b" * 32


def make(folder, *steps, branch="main", **settings):
    """A model and an optimizer that change with the step."""
    for step in steps:
        torch.manual_seed(0)
        weight = torch.randn(8, 4)
        weight[0] += step
        state = {
            "model": {"embed.weight": weight, "half": torch.ones(3).bfloat16() * step},
            "optimizer": {"state": {0: {"m": torch.ones(2) * step}}, "lr": 1 / (step + 1)},
            "data": {"order": (np.arange(5) + step).astype(">u2")},
        }
        components = [StateComponent(key, value, GLOBAL) for key, value in state.items()]
        config = CoordinatorConfig(branch=branch, **settings)
        with CheckpointCoordinator(components, output_dir=folder, config=config) as one:
            one.save_checkpoint(
                step=step, message=f"<b>step</b> {step}", metrics={"loss": 1 / (1 + step)}
            )


@pytest.fixture(scope="module")
def written_run(tmp_path_factory):
    """Three checkpoints on main, the later ones deltas; a branch with one, and a tag."""
    folder = tmp_path_factory.mktemp("view") / "run"
    make(folder, 1)
    make(folder, 2, 3, compression="auto")
    base = ckptcoord.open_repository(folder)
    source = CheckpointId(BranchName("main"), 2)
    base.log.append(lambda _: Fork(writer=WRITER, branch=BranchName("exp"), source=source))
    base.tag(TagName("best"), source, writer=WRITER)
    make(folder, 5, branch="exp")
    return folder


@pytest.fixture
def run(written_run, tmp_path):
    """A copy of it."""
    shutil.copytree(written_run, tmp_path / "run")
    return ckptcoord.open_repository(tmp_path / "run")


# --- the repository


def test_checkpoints_come_in_the_order_of_their_commits(run):
    assert [one.ref for one in run] == ["main@1", "main@2", "main@3", "exp@5"]
    assert len(run) == 4
    assert run.latest.ref == "exp@5"
    assert repr(run["main@2"]) == "<Checkpoint main@2, loss 0.333333>"
    assert repr(run).endswith("4 checkpoints, latest exp@5>")


@pytest.mark.parametrize(
    ("ref", "found"),
    [
        ("main@2", "main@2"),
        ("best", "main@2"),
        ("exp", "exp@5"),
        ("latest", "exp@5"),
        ("main@latest", "main@3"),
        ("checkpoint-5@exp", "exp@5"),
        (CheckpointId(BranchName("main"), 3), "main@3"),
    ],
)
def test_any_ref_names_a_checkpoint(run, ref, found):
    assert run[ref].ref == found
    assert ref in run
    assert run[ref] in run


HOSTILE = ["", "..", "../..", "/", "a\0b", "x" * 10_000, "main.lock", "main@", "main@x", "@1", " "]


@pytest.mark.parametrize("ref", [*HOSTILE, "main@9", "mian", 3, None, b"main@1", ["main@1"]])
def test_what_names_none_is_an_error_and_not_in_it(run, ref):
    assert ref not in run
    with pytest.raises((InvalidNameError, RefNotFoundError)):
        run[ref]


def test_the_nearest_are_offered(run):
    with pytest.raises(RefNotFoundError, match="no checkpoint 'main@9'") as caught:
        run["main@9"]
    assert caught.value.nearest == ("main@1", "main@2", "main@3")
    with pytest.raises(RefNotFoundError) as caught:
        run.branches["main"][8]
    assert caught.value.nearest == ("main@3", "main@2", "main@1")


def test_branches_and_tags_are_mappings(run):
    assert list(run.branches) == ["exp", "main"]
    main = run.branches["main"]
    assert [one.step for one in main] == [1, 2, 3]
    assert (len(main), main.head.ref, main[2].ref) == (3, "main@3", "main@2")
    assert repr(main) == "<Branch main at main@3: 3 of its own>"
    assert {name: one.ref for name, one in run.tags.items()} == {"best": "main@2"}


def test_a_branch_without_a_checkpoint_stands_where_it_was_forked(run):
    source = CheckpointId(BranchName("main"), 1)
    run.log.append(lambda _: Fork(writer=WRITER, branch=BranchName("new"), source=source))
    assert run.branches["new"].head.ref == "main@1"
    assert len(run.branches["new"]) == 0
    assert run["new"].ref == "main@1"


def test_an_empty_repository_is_one(tmp_path):
    config = CoordinatorConfig()
    with CheckpointCoordinator(
        [StateComponent("m", {}, GLOBAL)], output_dir=tmp_path, config=config
    ):
        pass
    empty = ckptcoord.open_repository(tmp_path)
    assert (list(empty), len(empty), empty.latest, bool(empty)) == ([], 0, None, True)
    assert "latest" not in empty
    assert "no checkpoints yet" in empty._repr_html_()


def test_what_was_there_before_is_there_still(run):
    assert isinstance(run, ckptcoord.Repository)
    assert len(run.state().commits) == 4
    assert run.manifest(run.resolve("best")).step == 2
    with pytest.raises(RepositoryNotFoundError):
        ckptcoord.open_repository("/nowhere/at all")


def test_looking_needs_no_torch(run):
    program = f"""
import sys, ckptcoord
run = ckptcoord.open_repository({run.url!r})
one = run["main@3"]
assert len(one.tensors) == 4 and one.spec("model.half").dtype == "BF16"
run.diff("main@1", "main@3"), run._repr_html_(), one._repr_html_()
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# --- a checkpoint


def test_a_checkpoint_knows_itself(run):
    one = run["main@2"]
    assert (one.step, one.branch, one.parent.ref, one.metrics) == (
        2,
        "main",
        "main@1",
        {"loss": 1 / 3},
    )
    assert one.components == ("data", "model", "optimizer")
    assert one.message == "<b>step</b> 2"
    assert one.manifest.kind.value == "delta"
    assert run["main@1"].parent is None
    assert run["exp@5"].parent.ref == "main@2"
    assert one == run["best"]
    assert one != run["main@3"]
    assert len({one, run["best"]}) == 1


def test_tensors_are_named_in_full(run):
    assert run["main@3"].tensors == (
        "data.order",
        "model.embed.weight",
        "model.half",
        "optimizer.state.0.m",
    )
    assert run["main@3"].spec("model.embed.weight").shape == (8, 4)


@pytest.mark.parametrize("ref", ["main@1", "main@2", "main@3", "exp@5"])
def test_one_tensor_is_loaded_from_any_point_of_a_chain(run, ref):
    one = run[ref]
    torch.manual_seed(0)
    want = torch.randn(8, 4)
    want[0] += one.step
    assert torch.equal(one.load("model.embed.weight"), want)
    assert torch.equal(one.load("model.half"), torch.ones(3).bfloat16() * one.step)
    order = one.load("data.order")
    assert (order.dtype, order.tolist()) == (np.dtype(">u2"), [n + one.step for n in range(5)])


def test_one_tensor_is_read_without_the_rest(run, tmp_path):
    folder = tmp_path / "run/checkpoint-1"
    (folder / "optimizer.safetensors").write_bytes(b"")
    (folder / "data.safetensors").unlink()
    (folder / "data.state.json").unlink()
    assert run["main@1"].load("model.half").tolist() == [1, 1, 1]
    with pytest.raises(CorruptError):
        run["main@1"].load("optimizer.state.0.m")
    with pytest.raises(CorruptError):
        run["main@1"].load("data.order")


def open_files(folder):
    """Those of this process that are below the folder; other threads open and close others."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(link.readlink())
    return [path for path in found if folder in path.parents]


def test_within_a_block_files_stay_open_and_are_read_once(run, tmp_path):
    one = run["main@3"]
    with one, one:
        half = one.load("model.half")
        assert open_files(tmp_path / "run")
        for file in tmp_path.glob("run/*/model.*safetensors"):
            file.unlink()
        assert torch.equal(one.load("model.half"), half)
        assert one.load("model.embed.weight").shape == (8, 4)
        assert torch.equal(one.state("model")["half"], half)
    assert not open_files(tmp_path / "run")
    with pytest.raises(CorruptError):
        one.load("model.half")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("model.embed.wieght", "model.embed.weight"),
        ("optimizer.state.0.n", "optimizer.state.0.m"),
        ("embed.weight", "model.embed.weight"),
    ],
)
def test_the_nearest_tensors_are_offered(run, name, nearest):
    for ask in (run["main@3"].load, run["main@3"].spec):
        with pytest.raises(TensorNotFoundError) as caught:
            ask(name)
        assert caught.value.nearest[0] == nearest
        assert nearest in caught.value.help


@pytest.mark.parametrize("name", [*HOSTILE, "model.", "model", ".weight", "model..half"])
def test_a_hostile_name_is_no_tensor(run, name):
    with pytest.raises(TensorNotFoundError):
        run["main@3"].load(name)
    with pytest.raises(ConfigError, match="data, model, optimizer"):
        run["main@3"].state(name or "nothing") if name != "model" else run["main@3"].state("m")


def test_states_come_back_as_they_were(run):
    state = run["main@3"].state("optimizer")
    assert (state["lr"], state["state"][0]["m"].tolist()) == (0.25, [3, 3])
    assert run["main@3"].state("data")["order"].tolist() == [3, 4, 5, 6, 7]


def test_the_outline_of_a_state_reads_no_tensor(run, tmp_path):
    path = tmp_path / "run/checkpoint-1/optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    outline = run["main@1"].state("optimizer", tensors=False)
    assert outline["lr"] == 0.5
    assert outline["state"][0]["m"] == TensorSpec(name="state.0.m", dtype="F32", shape=(2,))
    assert run["main@1"].state("data", tensors=False)["order"].shape == (5,)
    with pytest.raises(CorruptError):
        run["main@1"].state("optimizer")


def test_pieces_are_put_together_and_copies_have_labels(job):
    full = torch.arange(12.0).reshape(4, 3)

    def components(rank):
        piece = Sharded(full[2 * rank : 2 * rank + 2].clone(), (2 * rank, 0), (4, 3))
        return [
            StateComponent("m", {"w": piece}, PER_RANK),
            StateComponent("rng", {"s": torch.tensor([rank]), "n": rank}, PER_RANK),
        ]

    job.do(2, components, lambda coordinator, rank: coordinator.save_checkpoint(step=1))
    one = ckptcoord.open_repository(job.output_dir)["main@1"]
    assert one.tensors == ("m.w", "rng.rank00000.s", "rng.rank00001.s")
    assert torch.equal(one.load("m.w"), full)
    assert one.load("rng.rank00001.s").tolist() == [1]
    assert one.state("rng")["rank00001"]["n"] == 1


def test_what_was_saved_in_part_is_not_given_as_a_whole(tmp_path):
    state = {"w": Sharded(torch.ones(2), (0,), (4,))}
    with CheckpointCoordinator([StateComponent("m", state, PER_RANK)], output_dir=tmp_path) as one:
        one.save_checkpoint(step=1)
    saved = ckptcoord.open_repository(tmp_path)["main@1"]
    with pytest.raises(CkptError, match="has only parts of"):
        saved.load("m.w")
    assert saved.state("m")["w"].shape == (4,)


# --- differences


def test_a_diff_takes_refs_and_checkpoints(run):
    found = run.diff("main@1", run["main@3"], component="model")
    assert [one.name for one in found.changed] == ["model.half", "model.embed.weight"]
    assert found.changed[0].relative_l2 == pytest.approx(2.0)
    assert repr(found) == "<CheckpointDiff main@1 -> main@3: 2 changed tensors>"
    whole = run.diff("main@1", "main@3")
    assert [(one.path, one.old, one.new) for one in whole.scalars] == [("optimizer.lr", 0.5, 0.25)]


def test_a_checkpoint_of_another_repository_is_refused(run, tmp_path):
    make(tmp_path / "other", 1)
    other = ckptcoord.open_repository(tmp_path / "other")
    assert other["main@1"] not in run
    with pytest.raises(ConfigError, match="is of"):
        run.diff("main@1", other["main@1"])


# --- pages


class _Checked(HTMLParser):
    """Collects tags; what is open must be closed, and nothing comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href")
            assert "url(" not in (value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(html: str) -> _Checked:
    parser = _Checked()
    parser.feed(html)
    assert parser.open == []
    assert not {"script", "link", "iframe", "img", "object", "b"} & parser.tags
    assert "@import" not in html
    assert "://" not in html
    return parser


def test_pages_are_whole_escaped_and_need_nothing_from_elsewhere(run):
    assert {"svg", "circle", "table"} <= check_page(run._repr_html_()).tags
    assert "&lt;b&gt;step&lt;/b&gt; 5" in run._repr_html_()
    page = check_page(run["main@2"]._repr_html_())
    assert "table" in page.tags
    assert run["main@2"].manifest._repr_html_() == run["main@2"]._repr_html_()
    assert {"svg", "rect", "table"} <= check_page(run.diff("main@1", "main@3")._repr_html_()).tags
    assert "the states are equal" in run.diff("main@1", "main@1")._repr_html_()


def test_pictures_are_sound_xml(run):
    for html in (run._repr_html_(), run.diff("main@1", "exp@5")._repr_html_()):
        svg = html[html.index("<svg") : html.index("</svg>") + 6]
        assert ElementTree.fromstring(svg).tag == "svg"


def test_hostile_names_stay_text_in_pages(tmp_path):
    for step in (1, 2):
        state = {"<script>x</script>": torch.ones(2) * step, '"><img src=x>': math.nan * step}
        state |= {"n": "</svg><script>" * step, "z": torch.full((2,), math.nan) * step}
        ckptcoord.save(state, tmp_path / "it", keep=9, message="</style><script>alert(1)</script>")
    run = ckptcoord.open_repository(tmp_path / "it")
    for html in (run._repr_html_(), run.diff("main@1", "main@2")._repr_html_()):
        check_page(html)
        assert "<script" not in html
    assert "alert(1)" in run._repr_html_()
