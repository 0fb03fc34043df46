"""Loads of deltas: what they are made out of is checked first, and everything is decoded once."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptcoord import CheckpointCoordinator, Compression, SharingPattern, StateComponent
from ckptcoord.codec import delta as codec
from ckptcoord.dist import shardset
from ckptcoord.dist.shardset import ShardSet
from ckptcoord.dist.world import TorchWorld
from ckptcoord.errors import CkptError, CorruptError
from ckptcoord.repo import deltas
from ckptcoord.repo.deltas import DeltaReader
from ckptcoord.repo.readers import ShardReader
from ckptcoord.repo.repository import open_repository
from ckptcoord.repo.verify import verify_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

REPLICATED = SharingPattern.REPLICATED
CHAIN: Any = Compression(level="auto", base="previous", chain_below=1.0)  # type: ignore[arg-type]
SAVES = 8
READ = (1, 5, 7, SAVES)  # a chain skips: the last checkpoint is made out of these
LINKS = len(READ) - 1
LAST = f"checkpoint-{SAVES}"

State = dict[str, dict[str, Any]]

right_encode = codec.encode


class Owned:
    """Takes its state itself: what it is given is read beside, not in place."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state


def new_state() -> State:
    master = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    return {"model": {"w": master.bfloat16()}, "optimizer": {"master": master}}


def blank() -> State:
    return {
        key: {name: torch.zeros_like(one) for name, one in part.items()}
        for key, part in new_state().items()
    }


def declare(state: State, wrap: Callable[[Any], Any] = dict) -> list[StateComponent]:
    return [
        StateComponent(key, wrap(part), REPLICATED, validate_replication=True)
        for key, part in state.items()
    ]


def load(coordinator: CheckpointCoordinator, rank: int) -> object:
    return coordinator.load_checkpoint()


def saved(job: Any, size: int = 1, saves: int = SAVES) -> State:
    """An anchor and a chain of deltas, whose model is the cast of its optimizer's master."""
    states = [new_state() for _ in range(size)]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        master = states[rank]["optimizer"]["master"]
        for step in range(1, saves + 1):
            generator = torch.Generator().manual_seed(step)
            master.add_(torch.randn(master.shape, generator=generator), alpha=1e-4)
            states[rank]["model"]["w"].copy_(master.bfloat16())
            coordinator.save_checkpoint(step=step)

    job.do(size, lambda rank: declare(states[rank]), work, compression=CHAIN)
    return states[0]


def file_of(job: Any, step: int, component: str) -> Path:
    """The shard of a component in the checkpoint of a step that has a tensor's bytes."""
    (found,) = (job.output_dir / f"checkpoint-{step}").glob(f"{component}*.safetensors")
    return found


def flip(path: Path, at: int = -1) -> None:
    """Damage a byte of the very same file: an open reader sees it."""
    with path.open("r+b") as file:
        file.seek(at, 2 if at < 0 else 0)
        byte = file.read(1)[0]
        file.seek(at, 2 if at < 0 else 0)
        file.write(bytes([byte ^ 1]))


def same(one: State, other: State) -> bool:
    return all(
        torch.equal(one[key][name], value)
        for key, part in other.items()
        for name, value in part.items()
    )


def only_error(job: Any, state: State) -> CkptError:
    (error,) = job.run(1, lambda _: declare(state), load).errors
    assert isinstance(error, CkptError), error
    return error


def test_what_is_saved_here_is_a_chain_and_a_cast_of_it(job):
    want, live = saved(job), blank()
    assert file_of(job, 1, "optimizer").name.endswith("r.safetensors")
    for step in READ[1:]:
        assert file_of(job, step, "optimizer").name.endswith("r.delta.safetensors")
    assert file_of(job, SAVES, "model").stat().st_size < 2000
    job.do(1, lambda _: declare(live), load)
    assert same(live, want)


# --- damage --------------------------------------------------------------------------------------

DAMAGED = {"coded bytes": SAVES, "a link in the middle": 5, "the base": 1}


@pytest.mark.parametrize("wanted", ["optimizer", "model"])
@pytest.mark.parametrize("where", sorted(DAMAGED))
def test_damage_to_what_a_tensor_is_made_out_of_is_found_before_anything_changes(
    job, where, wanted
):
    saved(job)
    file = file_of(job, DAMAGED[where], "optimizer")
    flip(file)
    live = {wanted: blank()[wanted]}
    error = only_error(job, live)
    assert isinstance(error, CorruptError)
    assert f"{file.parent.name}/{file.name}" in str(error)
    assert "'master'" in str(error)
    assert same(live, {wanted: blank()[wanted]})
    assert "being filled" not in str(error)


def test_a_damaged_recipe_of_a_casts_source_is_found_before_anything_changes(job):
    """The recipes of a file beside are as sound as the manifest's digest of it."""
    saved(job)
    file = file_of(job, SAVES, "optimizer")
    digest = file.read_bytes().index(b"blake3:")
    flip(file, digest + 20)
    live = {"model": blank()["model"]}
    error = only_error(job, live)
    assert f"{LAST}/{file.name}" in str(error)
    assert not live["model"]["w"].any()
    assert "being filled" not in str(error)


def test_what_a_load_refuses_for_a_byte_that_no_tensor_takes_is_not_sound(job):
    """A delta against a base that was damaged before it decodes right; a load cannot know."""
    state = {"m": {"a": torch.randn(5000), "b": torch.randn(5000)}}

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        flip(file_of(job, 1, "m"))
        state["m"]["a"] *= 1.0001
        state["m"]["b"] *= 1.0001
        coordinator.save_checkpoint(step=2)

    job.do(1, lambda _: declare(state), work, compression=CHAIN)
    base, delta = file_of(job, 1, "m"), file_of(job, 2, "m")
    repository = open_repository(job.output_dir)
    report = verify_checkpoint(repository, repository.resolve("main@2"))
    (finding,) = report.findings
    assert (finding.path, finding.tensor) == (f"checkpoint-2/{delta.name}", "b")
    assert f"made out of checkpoint-1/{base.name}: tensor 'b' is corrupt" in finding.why

    live = {"m": {name: torch.zeros(5000) for name in "ab"}}
    error = only_error(job, live)
    assert f"checkpoint-1/{base.name}: tensor 'b' is corrupt" in str(error)
    assert not live["m"]["a"].any()
    flip(base)
    assert not verify_checkpoint(
        repository, repository.resolve("main@2")
    ).ok  # now it decodes wrong


@contextmanager
def between(monkeypatch: Any, work: Callable[[], None]) -> Iterator[None]:
    """Do this when all was checked and nothing is read."""
    check = ShardSet.check

    def check_and_work(self: ShardSet, *args: Any, **more: Any) -> Any:
        found = check(self, *args, **more)
        work()
        return found

    monkeypatch.setattr(ShardSet, "check", check_and_work)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("kept", [1, 128])
@pytest.mark.parametrize("wanted", [["optimizer"], ["model"], ["model", "optimizer"]])
@pytest.mark.parametrize("where", sorted(DAMAGED))
def test_a_file_that_changes_after_the_check_is_an_error_and_no_silent_value(
    job, where, wanted, kept, monkeypatch
):
    want = saved(job)
    monkeypatch.setattr(shardset, "_KEPT_OPEN", kept)
    file = file_of(job, DAMAGED[where], "optimizer")
    live, done = {key: blank()[key] for key in wanted}, []

    def once() -> None:
        if not done:
            flip(file)
            done.append(file)

    with between(monkeypatch, once):
        error = only_error(job, live)
    assert isinstance(error, CorruptError)
    assert "live tensors were being filled" in str(error)
    flip(file)
    job.do(1, lambda _: declare(live), load)
    assert same(live, {key: want[key] for key in wanted})


# --- what is authentic and wrong all the same -----------------------------------------------------


def bad_checksum(coded: bytes) -> bytes:
    return coded[:12] + bytes([coded[12] ^ 1]) + coded[13:]


def other_values(coded: bytes) -> bytes:
    return right_encode(torch.zeros(5000).numpy().view("uint8"), None, dtype="F32")


def cut(coded: bytes) -> bytes:
    return coded[:-1]


def faulty(monkeypatch: Any, job: Any, fault: Callable[[bytes], bytes]) -> None:
    """Save a delta with an encoder that has a fault; all digests are right."""

    def encode(*args: Any, **more: Any) -> bytes:
        return fault(right_encode(*args, **more))

    monkeypatch.setattr(codec, "encode", encode)
    saved(job, saves=2)
    monkeypatch.undo()


@pytest.mark.parametrize("fault", [bad_checksum, other_values])
def test_what_only_decoding_tells_is_told_when_it_is_decoded(job, fault, monkeypatch):
    faulty(monkeypatch, job, fault)
    error = only_error(job, blank())
    assert isinstance(error, CorruptError)
    assert "live tensors were being filled" in str(error)
    assert "Load again" in str(error)
    with CheckpointCoordinator(declare(blank()), output_dir=job.output_dir) as coordinator:
        repository = coordinator.repository
        assert not verify_checkpoint(repository, repository.resolve("latest")).ok


def test_what_the_frames_alone_tell_is_found_before_anything_changes(job, monkeypatch):
    faulty(monkeypatch, job, cut)
    live = blank()
    error = only_error(job, live)
    assert isinstance(error, CorruptError)
    assert "'master'" in str(error)
    assert same(live, blank())


# --- how often ------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often the bytes at each place were read while tensors were checked."""
    counts: Counter[tuple[str, int]] = Counter()
    lock, checking = threading.Lock(), threading.Event()
    read_range, check = ShardReader.read_range, ShardSet.check

    def counting(self: ShardReader, entry: Any, offset: int, out: memoryview, **more: Any) -> None:
        if checking.is_set():
            with lock:
                counts[self.path, entry.begin + offset] += 1
        read_range(self, entry, offset, out, **more)

    def checked(self: ShardSet, *args: Any, **more: Any) -> Any:
        checking.set()
        found = check(self, *args, **more)
        checking.clear()
        return found

    monkeypatch.setattr(ShardReader, "read_range", counting)
    monkeypatch.setattr(ShardSet, "check", checked)
    return counts


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each part that was decoded."""
    sizes: list[int] = []
    decode = deltas.decode

    def counting(coded: memoryview, out: Any, **more: Any) -> None:
        sizes.append(out.nbytes)
        decode(coded, out, **more)

    monkeypatch.setattr(deltas, "decode", counting)
    return sizes


def test_what_tensors_share_is_checked_once_a_load(job, reads):
    saved(job)
    live = blank()
    job.do(1, lambda _: declare(live), load)
    files = {path for path, _ in reads}
    assert files == {f"checkpoint-{step}/{file_of(job, step, 'optimizer').name}" for step in READ}
    assert set(reads.values()) == {1}


def test_a_load_decodes_each_link_once(job, decodes):
    saved(job)
    decodes.clear()
    live = {"optimizer": blank()["optimizer"]}
    job.do(1, lambda _: declare(live), load)
    assert len(decodes) == LINKS


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_read_beside_is_not_checked_before(job, size, decodes, monkeypatch):
    want = saved(job)
    decodes.clear()
    monkeypatch.setattr(DeltaReader, "inputs", lambda *_: pytest.fail("checked"))
    live = [{key: Owned(part) for key, part in blank().items()} for _ in range(size)]
    job.do(size, lambda rank: declare(live[rank], wrap=lambda one: one), load)
    assert len(decodes) == size * 2 * LINKS  # those of the master, and of the cast from it
    assert all(same({key: one.state for key, one in own.items()}, want) for own in live)


# --- ranks of a node ------------------------------------------------------------------------------


def test_a_tensor_of_a_delta_is_checked_by_one_rank_of_a_node(job, monkeypatch):
    want = saved(job, size=2)
    counts: Counter[tuple[str, str]] = Counter()
    check = DeltaReader.check_stored

    def counting(self: DeltaReader, entry: Any) -> None:
        counts[self.path, entry.spec.name] += 1
        check(self, entry)

    monkeypatch.setattr(DeltaReader, "check_stored", counting)
    live = [{"optimizer": blank()["optimizer"]} for _ in range(3)]
    job.do(3, lambda rank: declare(live[rank]), load)
    assert len(counts) == LINKS
    assert set(counts.values()) == {1}
    assert all(same(one, {"optimizer": want["optimizer"]}) for one in live)


def test_damage_that_one_rank_finds_is_an_error_on_all(job):
    saved(job)
    file = file_of(job, 5, "optimizer")
    flip(file)
    live = [blank() for _ in range(3)]
    for error in job.run(3, lambda rank: declare(live[rank]), load).errors:
        assert isinstance(error, CorruptError)
        assert file.name in error.path
    assert all(same(one, blank()) for one in live)


def test_a_rank_holds_what_another_one_checked_to_its_digest(job, monkeypatch):
    saved(job)
    file = file_of(job, SAVES, "optimizer")
    live, done, lock = [blank() for _ in range(2)], [], threading.Lock()
    fill = ShardSet.fill

    def damage_and_fill(self: ShardSet, wanted: Any, found: Any, **more: Any) -> None:
        wanted = list(wanted)
        with lock:
            if wanted and not done:
                flip(file)
                done.append(file)
        fill(self, wanted, found, **more)

    monkeypatch.setattr(ShardSet, "fill", damage_and_fill)
    for error in job.run(2, lambda rank: declare(live[rank]), load).errors:
        assert "being filled" in str(error)


BAD = {"a number": 7, "an odd text": "abc", "no hex": "g" * 32, "capitals": "AB" * 16, "a list": []}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_a_word_of_another_rank_that_is_no_fingerprint_is_refused(job, value, monkeypatch):
    saved(job)
    posts = TorchWorld.posts

    def altered(self: TorchWorld, key: str, ranks: Any, **more: Any) -> Any:
        found = posts(self, key, ranks, **more)
        return {rank: {LAST: {"w": value}} for rank in found}

    monkeypatch.setattr(TorchWorld, "posts", altered)
    live = [blank() for _ in range(2)]
    for error in job.run(2, lambda rank: declare(live[rank]), load).errors:
        assert "fingerprint" in str(error)
    assert all(same(one, blank()) for one in live)
