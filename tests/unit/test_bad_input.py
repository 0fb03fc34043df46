"""Bad input through the coordinator: a typed error on every rank, before anything is touched."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import threading
import time
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ckptcoord import (
    CheckpointCoordinator,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    open_repository,
)
from ckptcoord.errors import (
    CkptError,
    ConfigError,
    DisagreementError,
    InvalidNameError,
    LoadAbortedError,
    OutputDirError,
    RefNotFoundError,
    SaveAbortedError,
    SetupAbortedError,
    StateMismatchError,
    StorageError,
    StorageFullError,
    UnsupportedStateError,
)
from ckptcoord.repo.repository import Repository
from ckptcoord.repo.verify import verify_checkpoint
from ckptcoord.store.local import LocalStore
from ckptcoord.testing import FaultyStore
from ckptcoord.testing.ranks import Outcomes, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ckptcoord.dist.world import TorchWorld

GLOBAL, REPLICATED, PER_RANK = (
    SharingPattern.GLOBAL,
    SharingPattern.REPLICATED,
    SharingPattern.PER_RANK,
)


class Thing:
    """What nobody can be expected to understand. Its name is the same in every test process."""

    def __repr__(self) -> str:
        return "a thing"


SOON_S = 60.0  # well under the deadline: nobody was left waiting
TIMEOUT_S = 100.0


def part(key: str = "state", state: object = None, pattern: Any = GLOBAL, **more: Any) -> Any:
    return StateComponent(key, {"n": 1} if state is None else state, pattern, **more)


def both() -> list[StateComponent]:
    return [part("cursor"), part("own", {"t": torch.ones(3)}, PER_RANK)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def run(
    size: int,
    folder: Path,
    work: Callable[[CheckpointCoordinator, int], Any],
    declare: Callable[[int], list[StateComponent]] = lambda _: both(),
    groups: Callable[[int], Mapping[str, object]] = lambda _: {},
    **settings: Any,
) -> Outcomes[Any]:
    """Each rank's outcome; all of them well before the deadline."""
    settings = {"timeout_s": TIMEOUT_S} | settings

    def one(world: TorchWorld) -> Any:
        with CheckpointCoordinator(
            declare(world.rank),
            groups(world.rank),
            world,
            folder,
            config=CoordinatorConfig(**settings),
        ) as coordinator:
            return work(coordinator, world.rank)

    started = time.monotonic()
    outcomes = run_ranks(size, one)
    assert time.monotonic() - started < SOON_S, "somebody was left waiting"
    return outcomes


def save(step: int = 1, **more: Any) -> Callable[[CheckpointCoordinator, int], str]:
    return lambda coordinator, rank: coordinator.save_checkpoint(step=step, **more)


def untouched(folder: Path) -> bool:
    """No claim, no commit, nothing in staging."""
    repository = open_repository(folder)
    return repository.state().number == 0 and not any((folder / ".ckptcoord/staging").iterdir())


# --- arguments of a save -------------------------------------------------------------------------

UNSAYABLE = {
    "a message that is too long": {"message": "x" * 100_001},
    "a message that makes too long an entry": {"message": "\U0001f600" * 99_000},
    "a message that is no Unicode text": {"message": "half \ud83d"},
    "a message that is no text": {"message": b"bytes"},
    "a metric with no text as its name": {"metrics": {3: 1.0}},
    "a metric whose name is no Unicode text": {"metrics": {"\udcff": 1.0}},
    "a metric that is text": {"metrics": {"loss": "low"}},
    "a metric that no float can hold": {"metrics": {"loss": 10**400}},
    "more metrics than an entry can hold": {"metrics": {f"{i:040}": 0.5 for i in range(30_000)}},
    "metrics that are no mapping": {"metrics": [1.0]},
    "an epoch before the first": {"epoch": -1.0},
    "an epoch that is no number": {"epoch": math.nan},
    "an epoch that never comes": {"epoch": math.inf},
    "an epoch that is text": {"epoch": "three"},
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", sorted(UNSAYABLE))
def test_what_no_commit_could_say_is_refused_before_anything_is_written(
    folder: Path, name: str, size: int
):
    for error in run(size, folder, save(**UNSAYABLE[name])).errors:
        assert isinstance(error, ConfigError), error
        assert error.field.partition("[")[0] in ("message", "metrics", "epoch")
        assert len(str(error)) < 500
    assert untouched(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": -1}, {"step": None}, {"step": "5"}, {"step": 2, "message": "x" * 100_001},
        {"checkpoint_path": "/elsewhere/checkpoint-2"}, {"checkpoint_id": "../checkpoint-2"},
        {"checkpoint_id": 7}, {"checkpoint_path": 7}, {"step": 2, "metrics": {"loss": Thing()}},
    ],
    ids=str,
)  # fmt: skip
def test_an_argument_that_is_wrong_on_one_rank_is_heard_on_all_and_the_next_save_works(
    folder: Path, wrong: dict[str, Any]
):
    def work(coordinator: CheckpointCoordinator, rank: int) -> CkptError:
        with pytest.raises(CkptError) as caught:
            coordinator.save_checkpoint(**(wrong if rank == 1 else {"step": 2}))
        coordinator.save_checkpoint(step=3)
        return caught.value

    errors = run(3, folder, work).values
    for error in errors:
        assert isinstance(error, SaveAbortedError)
        assert set(error.failures) == {1}
    assert isinstance(errors[1].__cause__, ConfigError | InvalidNameError)
    assert [c.step for c in open_repository(folder).state().commits] == [3]


@pytest.mark.parametrize("wrong", [7, b"latest", "", "a\nb", Thing()], ids=str)
def test_a_ref_that_is_wrong_on_one_rank_is_heard_on_all_and_the_next_load_works(
    folder: Path, wrong: Any
):
    def work(coordinator: CheckpointCoordinator, rank: int) -> CkptError:
        coordinator.save_checkpoint(step=1)
        with pytest.raises(CkptError) as caught:
            coordinator.load_checkpoint(wrong if rank == 1 else "latest")
        assert coordinator.load_checkpoint("latest").step == 1
        return caught.value

    for error in run(2, folder, work).values:
        assert isinstance(error, LoadAbortedError | DisagreementError)


REFS = {
    "above": "../x",
    "above, as a folder": "../run/../../etc",
    "absolute": "/etc/passwd",
    "long": "x" * 10_000,
    "long path": "x/" * 2_000 + "y",
    "long part": "x/" + "y" * 4_000,
    "lock": "main.lock",
    "dot lock": ".lock",
    "empty": "",
    "control": "main\x07@5",
    "NUL": "a\0b",
    "newline": "main@5\n",
    "backslash": "..\\x",
    "surrogate": "\ud800",
    "marker": ".ckptcoord",
    "staging": ".ckptcoord/staging",
    "a folder without a commit": "./stranger",
    "no step": "main@",
    "huge step": "main@" + "9" * 400,
    "unicode digits": "main@\u0665",
    "a space": "my branch",
}


@pytest.mark.parametrize("name", sorted(REFS))
def test_an_odd_ref_is_refused_alike_on_every_rank(folder: Path, name: str):
    ref = REFS[name]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        for ask in (
            coordinator.load_checkpoint,
            coordinator.set_best_checkpoint,
            lambda ref: coordinator.save_checkpoint(checkpoint_id=ref),
        ):
            with pytest.raises((RefNotFoundError, InvalidNameError)) as caught:
                ask(ref)
            assert len(str(caught.value)) < 5_000

    run(2, folder, work).values  # noqa: B018
    with CheckpointCoordinator(both(), output_dir=folder) as coordinator:
        try:
            assert coordinator.resolve_checkpoint_path(ref) is None
        except InvalidNameError as error:
            assert len(str(error)) < 5_000  # noqa: PT017 (both answers are right)


def test_a_ref_through_a_loop_of_links_is_refused(folder: Path, tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with CheckpointCoordinator(both(), output_dir=folder) as coordinator:
        coordinator.save_checkpoint(step=1)
        ref = tmp_path / "a" / "checkpoint-1"
        assert coordinator.resolve_checkpoint_path(ref) is None
        with pytest.raises(RefNotFoundError):
            coordinator.load_checkpoint(ref)
        with pytest.raises(ConfigError):
            coordinator.save_checkpoint(ref)


# --- what is declared ----------------------------------------------------------------------------


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


UNWRITABLE = {
    "NaN": {"x": math.nan},
    "infinity": {"x": [math.inf]},
    "an object": {"x": object()},
    "a tensor": {"x": torch.ones(1)},
    "bytes": {"x": b"x"},
    "a tuple": {"x": (1, 2)},
    "a number as key": {"x": {1: 2}},
    "too deep": {"x": deep(100)},
    "without end": {"x": deep(5_000)},
    "half a pair": {"x": "\ud800"},
    "half a pair as key": {"\udfff": 1},
    "a huge number": {"x": 10**70},
}


@pytest.mark.parametrize("name", sorted(UNWRITABLE))
@pytest.mark.parametrize("odd", [None, 0, 1])
def test_metadata_that_no_manifest_holds_is_refused_at_set_up(
    folder: Path, name: str, odd: int | None
):
    def declare(rank: int) -> list[StateComponent]:
        return [part(metadata=UNWRITABLE[name] if odd in (None, rank) else {})]

    for error in run(2, folder, save(), declare).errors:
        assert isinstance(error, SetupAbortedError if odd is not None else ConfigError), error
        assert "metadata" in str(error)
    assert not folder.exists()


def test_metadata_that_goes_bad_later_is_heard_on_all_ranks(folder: Path):
    metadata: list[dict[str, Any]] = [{}, {}]

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        if rank == 1:
            metadata[1]["x"] = math.nan
        with pytest.raises(SaveAbortedError) as caught:
            coordinator.save_checkpoint(step=2)
        assert set(caught.value.failures) == {1}
        metadata[1].clear()
        coordinator.save_checkpoint(step=3)

    run(2, folder, work, lambda rank: [part(metadata=metadata[rank])]).values  # noqa: B018


@pytest.mark.parametrize(
    "odd", [{"required": False}, {"metadata": {"a": 1}}, {"pattern": REPLICATED}], ids=str
)
def test_ranks_that_declare_one_component_differently_are_told(folder: Path, odd: dict[str, Any]):
    def declare(rank: int) -> list[StateComponent]:
        return [part(**(odd if rank == 1 else {}))]

    for error in run(3, folder, save(), declare).errors:
        assert isinstance(error, DisagreementError)
        assert sorted(error.values.values()) == [[0, 2], [1]]
        (text,) = [text for text, ranks in error.values.items() if ranks == [1]]
        assert any(word in text for word in ("optional", '"a":1', "replicated"))
    assert untouched(folder)


@pytest.mark.parametrize("group", [Thing(), "0,1", [0, "1"], [[0, 1]], 3], ids=str)
def test_a_group_that_is_none_on_one_rank_is_heard_on_all(folder: Path, group: object):
    def groups(rank: int) -> dict[str, object]:
        return {"tp": group if rank == 1 else [0, 1]}

    for error in run(2, folder, save(), groups=groups).errors:
        assert isinstance(error, SetupAbortedError)
        assert set(error.failures) == {1}
        assert "process_groups['tp']" in error.failures[1]
    assert not folder.exists()


def test_components_of_some_instances_only_may_differ_and_others_still_hear_of_it(folder: Path):
    states = [{"t": torch.zeros(4)}, {"t": torch.ones(4)}, {}]

    def declare(rank: int) -> list[StateComponent]:
        more = {"process_group_name": "tp", "validate_replication": True}
        pair = part("pair", states[rank], SharingPattern.PER_GROUP, **more)
        return [part("cursor"), *([pair] if rank < 2 else [])]

    outcomes = run(3, folder, save(), declare, lambda rank: {"tp": [0, 1] if rank < 2 else [2]})
    assert {type(error).__name__ for error in outcomes.errors} == {"ReplicationError"}


# --- the trainer's own code ----------------------------------------------------------------------


def recurse() -> Any:
    return recurse()


def fail(error: BaseException) -> Callable[[], Any]:
    def state() -> Any:
        raise error

    return state


class Unreadable(torch.Tensor):
    """A tensor whose bytes cannot be had, as on a device that fell off the bus."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.cpu, torch.Tensor.detach):
            raise RuntimeError("device-side assert")
        return super().__torch_function__(func, types, args, kwargs or {})


class BadConfig(torch.nn.Linear):
    class _Config:
        def to_json_string(self) -> str:
            raise KeyError("model_type")

    config = _Config()


FAILING = {
    "recursion": lambda: part("own", {}, PER_RANK, get_state=recurse),
    "a key": lambda: part("own", {}, PER_RANK, get_state=fail(KeyError("x"))),
    "surrogates": lambda: part("own", {}, PER_RANK, get_state=fail(ValueError("bad \udcff name"))),
    "a long text": lambda: part("own", {}, PER_RANK, get_state=fail(ValueError("x" * 10**7))),
    "assertion": lambda: part("own", {}, PER_RANK, get_state=fail(AssertionError())),
    "memory": lambda: part("own", {}, PER_RANK, get_state=fail(MemoryError())),
    "stop": lambda: part("own", {}, PER_RANK, get_state=fail(StopIteration())),
    "deep": lambda: part("own", {"x": deep(3_000)}, PER_RANK),
    "itself": lambda: part("own", _knot(), PER_RANK),
    "unreadable": lambda: part("own", {"t": torch.ones(4).as_subclass(Unreadable)}, PER_RANK),
    "no state at all": lambda: part("own", 3, PER_RANK),
}


def _knot() -> dict[str, Any]:
    knot: dict[str, Any] = {}
    knot["knot"] = knot
    return knot


@pytest.mark.parametrize("name", sorted(FAILING))
@pytest.mark.parametrize("odd", [0, 1])
def test_whatever_the_trainers_code_raises_on_one_rank_all_ranks_hear_of_it(
    folder: Path, name: str, odd: int
):
    def declare(rank: int) -> list[StateComponent]:
        return [part("cursor"), FAILING[name]() if rank == odd else part("own", {}, PER_RANK)]

    outcomes = run(2, folder, save(), declare)
    for error in outcomes.errors:
        assert isinstance(error, SaveAbortedError)
        assert set(error.failures) == {odd}
        assert not error.silent
        assert len(str(error)) < 50_000
    assert not open_repository(folder).state().commits
    assert not any((folder / ".ckptcoord/staging").iterdir())


def test_a_config_that_cannot_be_written_stops_the_save_on_all_ranks(folder: Path):
    declare = [part("model", BadConfig(2, 2), GLOBAL), part("own", {}, PER_RANK)]
    for error in run(2, folder, save(), lambda _: declare).errors:
        assert isinstance(error, SaveAbortedError)
        assert "model_type" in error.failures[0]


def test_one_members_failure_while_it_writes_leaves_no_partner_waiting(folder: Path):
    """Members of a group that hold different names ask one another before they write."""

    def declare(rank: int) -> list[StateComponent]:
        tensor = torch.ones(4)
        first = tensor.as_subclass(Unreadable) if rank == 1 else tensor
        more = {"process_group_name": "pp", "validate_replication": True}
        stage = {f"layer.{rank}": torch.ones(2), "shared": torch.ones(3)}
        return [
            part("first", {"t": first}, PER_RANK),
            part("stages", stage, SharingPattern.PER_GROUP, **more),
        ]

    def work(coordinator: CheckpointCoordinator, rank: int) -> str:
        return coordinator.save_checkpoint(step=1)

    for error in run(2, folder, work, declare, lambda _: {"pp": [0, 1]}).errors:
        assert isinstance(error, SaveAbortedError)
        assert set(error.failures) == {1}
        assert "device-side assert" in error.failures[1]


def test_a_member_that_cannot_say_what_it_holds_is_named_to_its_partners(folder: Path):
    def declare(rank: int) -> list[StateComponent]:
        shared = torch.ones(3).as_subclass(Unreadable) if rank == 1 else torch.ones(3)
        stage = {f"layer.{rank}": torch.ones(2), "shared": shared}
        more = {"process_group_name": "pp", "validate_replication": True}
        return [part("stages", stage, SharingPattern.PER_GROUP, **more)]

    for error in run(2, folder, save(), declare, lambda _: {"pp": [0, 1]}).errors:
        assert isinstance(error, CkptError)
        assert "device-side assert" in str(error)


# --- ranks that do different things --------------------------------------------------------------


@pytest.mark.parametrize("odd", [0, 1])
def test_ranks_in_different_operations_are_told_and_can_go_on(folder: Path, odd: int):
    def work(coordinator: CheckpointCoordinator, rank: int) -> CkptError:
        coordinator.save_checkpoint(step=1)
        act = coordinator.load_checkpoint if rank == odd else coordinator.save_checkpoint
        with pytest.raises(DisagreementError) as caught:
            act(**({} if rank == odd else {"step": 2}))
        coordinator.save_checkpoint(step=3)
        return caught.value

    for error in run(3, folder, work).values:
        assert error.field == "operation"
        assert sorted(error.values.values()) == sorted(
            [[odd], [rank for rank in range(3) if rank != odd]]
        )


def test_a_coordinator_used_from_two_threads_does_one_thing_after_the_other(folder: Path):
    with CheckpointCoordinator(both(), output_dir=folder) as coordinator:
        failures: list[BaseException] = []

        def many(first: int) -> None:
            try:
                for step in range(first, first + 10):
                    coordinator.save_checkpoint(step=step)
                    coordinator.load_checkpoint(f"main@{step}")
            except BaseException as error:  # noqa: BLE001 (shown below)
                failures.append(error)

        threads = [threading.Thread(target=many, args=(first,)) for first in (0, 100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert len(open_repository(folder).state().commits) == 30


def test_two_threads_of_each_rank_are_in_step_or_are_told(folder: Path):
    def work(coordinator: CheckpointCoordinator, rank: int) -> list[str]:
        said: list[str] = []

        def one(act: Callable[[], object]) -> None:
            try:
                act()
                said.append("done")
            except CkptError as error:
                said.append(type(error).__name__)

        coordinator.save_checkpoint(step=1)
        acts = [lambda: coordinator.save_checkpoint(step=2), coordinator.load_checkpoint]
        threads = [threading.Thread(target=one, args=(act,)) for act in acts]
        for thread in threads if rank else reversed(threads):
            thread.start()
        for thread in threads:
            thread.join()
        coordinator.save_checkpoint(step=3)
        return said

    for said in run(2, folder, work).values:
        assert set(said) <= {"done", "DisagreementError"}


def test_an_operation_within_an_operation_is_refused(folder: Path):
    held: list[CheckpointCoordinator] = []
    inner: list[CkptError] = []

    def state() -> dict[str, int]:
        with pytest.raises(ConfigError) as caught:
            held[0].save_checkpoint(step=9)
        inner.append(caught.value)
        return {"n": 1}

    with CheckpointCoordinator([part(get_state=state)], output_dir=folder) as coordinator:
        held.append(coordinator)
        coordinator.save_checkpoint(step=1)
    assert len(inner) == 1
    assert [c.step for c in open_repository(folder).state().commits] == [1]


def test_two_coordinators_of_one_job_do_not_hear_each_other(folder: Path, tmp_path: Path):
    import torch.distributed as c10d

    from ckptcoord.dist.world import TorchWorld

    store = c10d.HashStore()

    def one(world: TorchWorld) -> list[str]:
        made = []
        for number in range(2):
            own = TorchWorld(
                c10d.PrefixStore(f"ckptcoord/{number}", store),
                world.rank, world.size, host="here", host_is_rank_0=False,
            )  # fmt: skip
            config = CoordinatorConfig(timeout_s=TIMEOUT_S)
            made.append(
                CheckpointCoordinator(both(), None, own, tmp_path / str(number), config=config)
            )
        saved = [coordinator.save_checkpoint(step=5) for coordinator in made]
        for coordinator in made:
            coordinator.close()
        return saved

    assert (
        run_ranks(2, one).values
        == [[str(tmp_path / str(number) / "checkpoint-5") for number in range(2)]] * 2
    )


def test_a_coordinator_that_could_not_be_made_leaves_no_thread(folder: Path):
    before = threading.active_count()
    twice = [part("a"), part("a")]
    for _ in range(5):
        assert run(2, folder, save(), lambda _: twice).errors
    patience = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < patience:
        time.sleep(0.01)  # a thread ends a moment after it was told to
    assert threading.active_count() <= before


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout_s": math.nan}, {"timeout_s": math.inf}, {"timeout_s": 1e12}, {"timeout_s": "1"},
        {"training_args_hash": ""}, {"training_args_hash": "x" * 201}, {"io_threads": 1.5},
        {"training_args_hash": "\ud800"}, {"training_args_hash": 7}, {"max_shard_size": math.nan},
        {"io_threads": True}, {"keep_last": 1.5}, {"max_shard_size": "5GB"}, {"branch": 3},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_would_only_fail_later_are_refused_at_once(wrong: dict[str, Any]):
    with pytest.raises((ConfigError, InvalidNameError)):
        CoordinatorConfig(**wrong)


# --- where it is written -------------------------------------------------------------------------


def test_a_read_only_output_dir_is_refused_on_every_rank(tmp_path: Path):
    for place in ("/proc/self/checkpoints", "/sys/checkpoints"):
        for error in run(2, Path(place), save()).errors:
            assert isinstance(error, OutputDirError)
            assert place in str(error)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300], ids=ascii)
def test_an_output_dir_that_cannot_be_a_folder_is_refused(tmp_path: Path, name: str):
    with pytest.raises(OutputDirError):
        CheckpointCoordinator(both(), output_dir=f"{tmp_path}/{name}").close()


def test_an_output_dir_below_a_file_or_a_dangling_link_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for place in ("file/run", "link"):
        with pytest.raises(OutputDirError):
            CheckpointCoordinator(both(), output_dir=tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_an_error_on_every_rank_and_the_last_checkpoint_stands(small_disk: Path):
    states = [{"t": torch.ones(1000)}, {"t": torch.ones(1000)}]

    def work(coordinator: CheckpointCoordinator, rank: int) -> CkptError:
        coordinator.save_checkpoint(step=1)
        if rank == 1:
            states[1]["t"] = torch.ones(1 << 20)
        with pytest.raises(SaveAbortedError) as caught:
            coordinator.save_checkpoint(step=2)
        if rank == 1:
            states[1]["t"] = torch.full((1000,), 2.0)
        coordinator.save_checkpoint(step=3)
        return caught.value

    folder = small_disk / "run"
    errors = run(2, folder, work, lambda rank: [part("own", states[rank], PER_RANK)]).values
    for error in errors:
        assert set(error.failures) == {1}
        assert "StorageFullError" in error.failures[1]
    assert isinstance(errors[1].__cause__, StorageFullError)
    repository = open_repository(folder)
    assert [c.step for c in repository.state().commits] == [1, 3]
    assert all(verify_checkpoint(repository, c).ok for c in repository.state().commits.values())


def with_store(coordinator: CheckpointCoordinator, store: Any) -> None:
    session = coordinator._session
    session.repository = Repository(store, clock=lambda: datetime.now(UTC))


def failing(at: int, code: int) -> Callable[[int, str, str], Exception | None]:
    """One mutating operation fails, with what the system would say."""
    kind = StorageFullError if code == errno.ENOSPC else StorageError

    def answer(number: int, name: str, path: str) -> Exception | None:
        if number != at:
            return None
        return kind(operation=name, path=path, why=os.strerror(code), errno=code)

    return answer


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_storage_failure_at_any_write_of_any_rank_leaves_the_last_checkpoint(
    folder: Path, code: int, odd: int
):
    """Every mutating operation of one rank fails once; the others hear of it."""
    run(2, folder, save(0)).values  # noqa: B018
    asked: list[int] = []

    def work(coordinator: CheckpointCoordinator, rank: int, at: int) -> None:
        store = FaultyStore(LocalStore(folder), fail=failing(at, code))
        if rank == odd:
            with_store(coordinator, store)
        try:
            coordinator.save_checkpoint(step=at + 1)
        except CkptError:
            with_store(coordinator, LocalStore(folder))
            assert coordinator.load_checkpoint().step in (at, at + 1)
        else:
            assert coordinator.load_checkpoint().step == at + 1
        if rank == odd:
            asked.append(len(store.operations))

    at = 0
    while not asked or asked[-1] > at - 1:
        run(2, folder, partial(work, at=at)).values  # noqa: B018
        if open_repository(folder).resolve("latest").checkpoint_id.step == at:
            run(2, folder, save(at + 1)).values  # noqa: B018
        at += 1
    repository = open_repository(folder)
    assert at > 5
    assert all(verify_checkpoint(repository, c).ok for c in repository.state().commits.values())


# --- a load that does not fit changes nothing ----------------------------------------------------


def frozen(state: dict[str, Any]) -> str:
    return repr({k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in state.items()})


class Refusing:
    """Takes no state."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("n")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("saved", "live"),
    [
        ({"a": 1}, [1]), ([1], {"a": 1}), ((1, 2), {"a": 1}), (None, {"a": 1}), ("text", [1]),
        (torch.ones(2), {"a": 1}),
    ],
    ids=repr,
)  # fmt: skip
def test_state_of_another_structure_is_refused_before_anything_changes(
    folder: Path, saved: object, live: object, size: int
):
    def declare(_: int) -> list[StateComponent]:
        return [part("a", {"w": torch.ones(2)}), part("b", {}, get_state=lambda: saved)]

    run(size, folder, save(), declare).values  # noqa: B018
    first = [{"w": torch.zeros(2)} for _ in range(size)]
    before = repr(live)
    for error in run(
        size,
        folder,
        lambda coordinator, _: coordinator.load_checkpoint(),
        lambda rank: [part("a", first[rank]), part("b", live)],
    ).errors:
        assert isinstance(error, StateMismatchError)
        assert "b" in str(error)
    assert repr(live) == before
    assert not any(state["w"].any() for state in first)


def test_a_module_asked_to_take_what_is_no_dict_is_refused_before_anything_changes(folder: Path):
    declare = [part("a", {"w": torch.ones(2)}), part("model", {}, get_state=lambda: [1, 2])]
    run(1, folder, save(), lambda _: declare).values  # noqa: B018
    first, model = {"w": torch.zeros(2)}, torch.nn.Module()
    work = lambda coordinator, _: coordinator.load_checkpoint()  # noqa: E731
    (error,) = run(1, folder, work, lambda _: [part("a", first), part("model", model)]).errors
    assert isinstance(error, StateMismatchError)
    assert not first["w"].any()


def test_a_class_that_is_gone_is_an_error_before_anything_changes(folder: Path):
    declare = [part("a", {"w": torch.ones(2)}), part("b", {"c": Coming.ON})]
    run(2, folder, save(), lambda _: declare).values  # noqa: B018
    live = [{"w": torch.zeros(2)} for _ in range(2)]
    kept = Coming.__qualname__, globals().pop("Coming")
    try:
        outcomes = run(
            2,
            folder,
            lambda coordinator, _: coordinator.load_checkpoint(),
            lambda rank: [part("a", live[rank]), part("b", {})],
        )
    finally:
        globals()[kept[0]] = kept[1]
    for error in outcomes.errors:
        assert isinstance(error, CkptError)
        assert "Coming" in str(error)
    assert not any(state["w"].any() for state in live)


def test_a_component_that_raises_while_it_is_filled_is_no_silent_mixture(folder: Path):
    """The one thing that INV-8 cannot give: the trainer's own code fails after the last check."""

    def declare(state: dict[str, Any]) -> list[StateComponent]:
        return [part("a", state), part("b", Refusing())]

    run(2, folder, save(), lambda _: declare({"w": torch.ones(2)})).values  # noqa: B018
    live = [{"w": torch.zeros(2)} for _ in range(2)]

    def load(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.load_checkpoint()

    for error in run(2, folder, load, lambda rank: declare(live[rank])).errors:
        assert "'b'" in str(error)
        assert "No live tensor was changed" not in str(error)
        assert "loaded already" in str(error)

    def one_sided(rank: int) -> list[StateComponent]:
        refusing = part("b", Refusing()) if rank else part("b", {})
        return [part("a", live[rank]), refusing]

    for error in run(2, folder, load, one_sided).errors:
        assert isinstance(error, LoadAbortedError)
        assert error.phase == "apply"
        assert "No live tensor was changed" not in str(error)
        assert "load again" in error.help


# --- a model's own folder ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place", [".", "..", "checkpoint-1", ".ckptcoord", ".ckptcoord/log", "checkpoint-1/inner"]
)
def test_a_model_folder_never_takes_the_place_of_checkpoints(folder: Path, place: str):
    model = torch.nn.Linear(2, 2)
    (folder.parent / "precious").write_text("precious")

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        coordinator.save_checkpoint(step=1)
        with pytest.raises(ConfigError, match="output_dir"):
            coordinator.save_model(folder / place, overwrite_output_dir=True)

    run(2, folder, work, lambda _: [part("model", model, REPLICATED)]).values  # noqa: B018
    repository = open_repository(folder)
    report = verify_checkpoint(repository, repository.resolve("main@1"))
    assert report.ok
    assert not report.findings
    assert (folder.parent / "precious").exists()


def test_a_model_folder_that_cannot_be_written_is_an_error_on_every_rank(folder: Path):
    (folder.parent / "file").write_text("precious")

    def work(coordinator: CheckpointCoordinator, rank: int) -> None:
        with pytest.raises(OutputDirError):
            coordinator.save_model(folder.parent / "file", overwrite_output_dir=True)
        with pytest.raises(OutputDirError):
            coordinator.save_model(folder.parent / "file" / "model")

    run(2, folder, work, lambda _: [part("model", torch.nn.Linear(2, 2))]).values  # noqa: B018
    assert (folder.parent / "file").read_text() == "precious"


def test_a_checkpoint_that_does_not_verify_after_its_save_says_so_on_every_rank(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from ckptcoord.errors import CorruptError
    from ckptcoord.repo.attempt import Attempt

    commit = Attempt.commit

    def damaging(self: Attempt, path: str, *args: Any, **more: Any) -> None:
        commit(self, path, *args, **more)
        document = folder / path / "cursor.state.json"
        document.write_bytes(document.read_bytes().replace(b"1", b"2"))

    monkeypatch.setattr(Attempt, "commit", damaging)
    for error in run(2, folder, save(validate=True)).errors:
        assert isinstance(error, CorruptError)
        assert "cursor.state.json" in str(error)


# --- size ----------------------------------------------------------------------------------------


def test_state_too_large_to_be_read_again_is_refused_at_the_save(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("ckptcoord.dist.capture.MAX_STATE_BYTES", 1000)
    (error,) = run(1, folder, save(), lambda _: [part("big", {"ints": list(range(1000))})]).errors
    assert isinstance(error, UnsupportedStateError)
    assert "big" in str(error)


class Coming(Enum):
    """Stands in a state, and is gone when the state is loaded."""

    ON = 1
