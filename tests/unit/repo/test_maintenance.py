"""gc: what no checkpoint needs goes, after a sweep entry and a grace period; all else stays."""

from __future__ import annotations

import random
import secrets
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.repo.gcworld import BEGIN, MAIN, World, check_live, cid

from ckptcoord import (
    CheckpointCoordinator,
    CoordinatorConfig,
    SharingPattern,
    StateComponent,
    open_repository,
)
from ckptcoord.core.entries import Sweep
from ckptcoord.core.refs import TagName
from ckptcoord.errors import AttemptSweptError, ConfigError, ManifestError, StorageError
from ckptcoord.plan.commit import STAGING, live_folders
from ckptcoord.plan.retention import Retention
from ckptcoord.plan.sweeping import ABANDONED_S, Folder, GcPlan, Listing, Why, plan_gc
from ckptcoord.repo.maintenance import local_times, prepare_gc, retain, run_gc
from ckptcoord.repo.repository import create_repository, create_store, open_store
from ckptcoord.store.local import LocalStore
from ckptcoord.store.memory import MemoryStore
from ckptcoord.testing import FaultyStore, SimulatedCrash

HOUR_S = 3600.0


@pytest.fixture
def world():
    return World()


def plan_of(world, grace_s=HOUR_S, **options):
    gc = prepare_gc(
        world.repository, now=world.now, changed=world.changed, grace_s=grace_s, **options
    )
    return gc.plan


def gc(world, grace_s=HOUR_S):
    """A whole run; what it deleted, by path."""
    prepared = prepare_gc(world.repository, now=world.now, changed=world.changed, grace_s=grace_s)
    result = run_gc(world.repository, prepared, writer=world.writer)
    for _, error in result.failed:
        raise error
    assert result.plan == prepared.plan
    assert {*result.deleted, *result.spared} == set(prepared.plan.doomed)
    return {one.path: one.why for one in result.deleted}


def kept(plan):
    return {one.path: one.why for one in plan.kept}


def sweeps(world):
    return [one.body for one in world.repository.log.entries() if isinstance(one.body, Sweep)]


# --- retired checkpoints -------


def test_a_retired_checkpoint_goes_after_its_grace_and_after_a_sweep_entry(world):
    for step in (1, 2):
        world.save(step)
    world.retire(1)
    world.pass_time(minutes=59)
    assert kept(plan_of(world)) == {"checkpoint-1": "retired 59 min ago"}
    assert gc(world) == {}
    assert not sweeps(world)
    world.pass_time(minutes=1)
    assert gc(world) == {"checkpoint-1": Why.RETIRED}
    assert [one.paths for one in sweeps(world)] == [("checkpoint-1",)]
    assert (world.folders(), world.staged()) == ({"checkpoint-2"}, set())
    assert plan_of(world) == GcPlan()
    assert len(check_live(world.store).commits) == 1


def test_what_a_live_checkpoint_needs_stays_until_nothing_needs_it(world):
    base = world.save(1)
    world.save(2, needs=[base])
    world.save(3, needs=[base])
    world.retire(1, 2)
    assert kept(plan_of(world, 0)) == {"checkpoint-1": "needed by main@3"}
    assert gc(world, 0) == {"checkpoint-2": Why.RETIRED}
    world.save(4)
    world.retire(3)
    assert gc(world, 0) == {"checkpoint-1": Why.RETIRED, "checkpoint-3": Why.RETIRED}
    check_live(world.store)


def test_a_replaced_checkpoint_goes_like_a_retired_one(world):
    world.save(1)
    beside = world.save(1)
    assert beside != "checkpoint-1"
    assert gc(world) == {}
    world.pass_time(hours=1)
    assert gc(world) == {"checkpoint-1": Why.RETIRED}
    assert world.folders() == {beside}


def test_a_retired_folder_that_somebody_deleted_gives_its_name_back(world):
    world.save(1)
    world.save(2)
    world.retire(1)
    world.store.remove_tree("checkpoint-1")
    assert gc(world, 0) == {"checkpoint-1": Why.RETIRED}
    assert world.state().retired == {}
    assert world.save(1) == "checkpoint-1"


def test_a_retired_folder_with_other_files_in_it_stays(world):
    world.save(1)
    world.save(2)
    world.retire(1)
    for manifest in (True, False):
        world.store.remove_tree("checkpoint-1")
        world.write("checkpoint-1", manifest=manifest)
        assert gc(world, 0) == {}
        assert "does not hold" in kept(plan_of(world, 0))["checkpoint-1"]


# --- dead saves and debris -------


def test_an_unfinished_save_goes_once_it_is_dead(world):
    world.save(1)
    dead, alive, unknown = (f"{STAGING}/{world.stage()}" for _ in range(3))
    world.ages_s = {dead: ABANDONED_S, alive: ABANDONED_S - 1}
    world.changed = lambda path, own=world.changed: None if path == unknown else own(path)
    whys = kept(plan_of(world))
    assert whys.keys() == {alive, unknown}
    assert "1439 min ago" in whys[alive]
    assert "unknown time" in whys[unknown]
    assert gc(world) == {dead: Why.ABANDONED}
    assert {f"{STAGING}/{name}" for name in world.staged()} == {alive, unknown}


def test_what_a_kill_left_of_the_probe_for_a_writable_folder_goes_like_a_dead_save(world):
    class Killed(FaultyStore):
        def remove_tree(self, path: str) -> None:
            raise SimulatedCrash

    with pytest.raises(SimulatedCrash):
        create_store(Killed(world.store), clock=lambda: world.now)
    (name,) = world.staged()
    assert name.startswith(".writable-")
    world.pass_time(days=1)
    staged = f"{STAGING}/{name}"
    world.ages_s = {staged: ABANDONED_S - 1}
    assert gc(world) == {}
    world.ages_s = {staged: ABANDONED_S}
    assert gc(world) == {staged: Why.ABANDONED}
    assert world.staged() == set()
    world.store.make_dirs(f"{STAGING}/.writable-mine")
    world.pass_time(days=9)
    assert gc(world) == {}, "no name of ours"


def test_a_grace_of_more_than_a_day_is_kept_for_unfinished_saves_too(world):
    staged = f"{STAGING}/{world.stage()}"
    world.ages_s = {staged: ABANDONED_S * 3}
    assert gc(world, ABANDONED_S * 4) == {}
    assert gc(world, ABANDONED_S * 3) == {staged: Why.ABANDONED}


@pytest.mark.parametrize("renamed", [False, True])
def test_a_swept_save_that_was_alive_after_all_cannot_commit(world, renamed):
    world.save(1)
    attempt = world.stage(manifest=True)
    path = world.publish(attempt, 2) if renamed else f"{STAGING}/{attempt}"
    world.pass_time(days=1)
    assert gc(world) == {path: Why.DEBRIS if renamed else Why.ABANDONED}
    with pytest.raises(AttemptSweptError):
        world.commit(attempt, 2, "checkpoint-2")
    check_live(world.store)


def test_a_save_that_commits_before_the_sweep_is_spared(world):
    world.save(1)
    attempt = world.stage(manifest=True)
    path = world.publish(attempt, 2)
    world.pass_time(days=1)
    prepared = prepare_gc(world.repository, now=world.now, changed=world.changed)
    assert [one.path for one in prepared.plan.doomed] == [path]
    world.commit(attempt, 2, path)
    result = run_gc(world.repository, prepared, writer=world.writer)
    assert (result.deleted, result.spared, result.failed) == ((), prepared.plan.doomed, ())
    assert not sweeps(world)
    assert len(check_live(world.store).commits) == 2


def test_what_was_moved_aside_goes_when_nobody_knows_it(world):
    world.save(1)
    nonces = [secrets.token_hex(16) for _ in range(2)]
    world.write(f"{STAGING}/{nonces[0]}-debris")
    world.write(f"{STAGING}/{nonces[1]}-swept", manifest=False)
    world.pass_time(minutes=61)
    assert gc(world) == {f"{STAGING}/{nonces[1]}-swept": Why.SWEPT}
    world.pass_time(days=1)
    assert gc(world) == {f"{STAGING}/{nonces[0]}-debris": Why.ABANDONED}
    # Whoever moved it there by that nonce may still commit.
    world.write(f"{STAGING}/{nonces[0]}", nonces[0])
    world.commit(nonces[0], 2, world.publish(nonces[0], 2))


def test_what_gc_does_not_know_or_cannot_read_stays(world):
    world.save(1)
    attempt = world.state().commits[cid(1)].attempt
    world.write("checkpoint-500", manifest=False)  # another trainer's
    world.write("checkpoint-600")
    world.store.remove_tree("checkpoint-600/checkpoint_manifest.json")
    world.store.put("checkpoint-600/checkpoint_manifest.json", b"{")
    world.write("checkpoint-700", attempt)  # a copy by hand
    world.write("checkpoint-best")
    world.write("runs")
    world.write(f"{STAGING}/notes")
    world.pass_time(days=99)
    before = world.folders()
    assert gc(world, 0) == {}
    whys = kept(plan_of(world, 0))
    assert whys.keys() == {"checkpoint-500", "checkpoint-600", "checkpoint-700"}
    assert "no checkpoint of ckptcoord" in whys["checkpoint-500"]
    assert "cannot be read" in whys["checkpoint-600"]
    assert "main@1" in whys["checkpoint-700"]
    assert world.folders() == before
    assert world.staged() == {"notes"}


def test_a_checkpoint_that_was_left_aside_is_put_back(world):
    for step in (1, 2):
        world.save(step)
    world.store.move_dir("checkpoint-1", aside := f"{STAGING}/{secrets.token_hex(16)}-swept")
    plan = plan_of(world, 0)
    assert [(one.path, one.target) for one in plan.restored] == [(aside, "checkpoint-1")]
    assert plan.doomed == ()
    assert gc(world, 0) == {}
    assert len(check_live(world.store).commits) == 2


def test_new_files_under_a_swept_name_are_put_back(world):
    """Between look and move, another gc deletes the folder and a save takes its name."""
    world.save(1)
    world.save(2)
    world.retire(1)
    prepared = prepare_gc(world.repository, now=world.now, changed=world.changed, grace_s=0)
    move, new = world.store.move_dir, []

    def overtaken(source, target):
        if source == "checkpoint-1" and not new:
            world.store.remove_tree("checkpoint-1")
            new.append(world.save(1))
        move(source, target)

    world.store.move_dir = overtaken
    result = run_gc(world.repository, prepared, writer=world.writer)
    assert new == ["checkpoint-1"]
    assert [one.path for one in result.spared] == ["checkpoint-1"]
    assert len(check_live(world.store).commits) == 2


def test_a_strangers_files_under_a_swept_name_are_left_alone(world):
    world.save(1)
    world.save(2)
    world.retire(1)
    prepared = prepare_gc(world.repository, now=world.now, changed=world.changed, grace_s=0)
    world.store.remove_tree("checkpoint-1")
    world.write("checkpoint-1", manifest=False)
    result = run_gc(world.repository, prepared, writer=world.writer)
    assert [one.path for one in result.spared] == ["checkpoint-1"]
    assert world.folders() == {"checkpoint-1", "checkpoint-2"}
    assert gc(world, 0) == {}


# --- how it runs -------


def test_looking_changes_nothing():
    store = FaultyStore(MemoryStore())
    world = busy(World(store))
    before = store.operations
    plan_of(world, 0)
    assert store.operations == before


def test_many_folders_go_in_entries_of_a_few(world, monkeypatch):
    monkeypatch.setattr("ckptcoord.repo.maintenance._BATCH", 2)
    for step in range(6):
        world.save(step)
    world.retire(*range(5))
    assert len(gc(world, 0)) == 5
    assert [len(one.paths) for one in sweeps(world)] == [2, 2, 1]


def busy(world):
    """Something of each kind; a day later, gc has much to do."""
    base = world.save(1)
    for step in (2, 3, 4):
        world.save(step, needs=[base] if step == 4 else ())
    world.retire(1, 2, 3)
    world.stage()
    world.publish(world.stage(manifest=True), 9)
    world.write(f"{STAGING}/{secrets.token_hex(16)}-debris")
    world.pass_time(days=2)
    return world


def is_clean(world):
    return world.folders() == {"checkpoint-1", "checkpoint-4"} and not world.staged()


def test_a_gc_has_much_to_do():
    world = busy(World())
    assert len(gc(world)) == 5
    assert is_clean(world)


@pytest.mark.parametrize("power_loss", [False, True], ids=["killed", "power lost"])
def test_killed_anywhere_and_run_again_it_is_done(power_loss):
    counting = FaultyStore(MemoryStore())
    world = busy(World(counting))
    first = len(counting.operations)
    gc(world)
    for crash_at in range(first, len(counting.operations)):
        inner = MemoryStore()
        busy(World(inner))
        dying = World(inner)
        dying.move_to(FaultyStore(inner, crash_at=crash_at - first))
        dying.pass_time(days=2)
        with pytest.raises(SimulatedCrash):
            gc(dying)
        left = inner.crash(random.Random(crash_at)) if power_loss else inner
        check_live(left)
        again = World(left)
        again.pass_time(days=4)
        gc(again)
        check_live(left)
        assert is_clean(again), crash_at
        assert again.save(5) == "checkpoint-5"


def test_what_the_storage_will_not_delete_holds_nothing_else_up():
    inner = MemoryStore()
    busy(World(inner))

    def fail(_, name, path):
        if name == "move_dir" and path.endswith("-swept"):
            return StorageError(operation="rename", path=path, why="Permission denied")
        return None

    world = World(FaultyStore(inner, fail=fail))
    world.pass_time(days=2)
    prepared = prepare_gc(world.repository, now=world.now, changed=world.changed)
    result = run_gc(world.repository, prepared, writer=world.writer)
    assert len(result.failed) == 4
    assert {"checkpoint-2", "checkpoint-3", "checkpoint-9"} < {path for path, _ in result.failed}
    assert [one.path[-7:] for one in result.deleted] == ["-debris"]
    again = World(inner)
    again.pass_time(days=2)
    gc(again)
    assert is_clean(again)


# --- after a save -------


def run_retain(world, rules):
    return retain(
        world.repository, MAIN, rules, writer=world.writer, now=world.now, changed=world.changed
    )


def test_retention_retires_now_and_deletes_a_save_later(world):
    rules = Retention(keep_last=1, keep_every=10)
    for step in (10, 11, 12):
        world.save(step)
        run_retain(world, rules)
    assert sorted(one.step for one in world.state().commits) == [10, 12]
    assert world.folders() == {"checkpoint-10", "checkpoint-11", "checkpoint-12"}
    run_retain(world, rules)
    assert world.folders() == {"checkpoint-10", "checkpoint-12"}


def test_a_save_sweeps_dead_saves_even_without_rules(world):
    world.save(1)
    world.save(2)
    world.retire(1)
    dead, alive = world.stage(), world.stage()
    world.ages_s = {f"{STAGING}/{alive}": 5.0}
    world.pass_time(days=1)
    result = run_retain(world, Retention())
    assert [one.why for one in result.deleted] == [Why.ABANDONED]
    assert world.staged() == {alive}
    assert dead in world.state().swept
    assert world.folders() == {"checkpoint-1", "checkpoint-2"}  # no rule: only `gc` takes them


def test_a_tag_that_comes_meanwhile_is_heeded(world):
    for step in (1, 2, 3):
        world.save(step)
    other = World(world.store)
    other.repository.tag(TagName("best"), cid(1), writer=other.writer)
    run_retain(world, Retention(keep_last=1))
    assert set(world.state().commits) == {cid(1), cid(3)}


def test_the_folders_of_a_disk_have_times(tmp_path):
    world = World()
    world.repository = create_repository(tmp_path, clock=lambda: world.now)
    (tmp_path / "checkpoint-1").mkdir()
    changed = local_times(world.repository)
    assert changed("checkpoint-1") == (tmp_path / "checkpoint-1").stat().st_mtime
    assert changed("checkpoint-2") is None
    assert local_times(World().repository)("checkpoint-1") is None


# --- the rules of a repository -------


def clock():
    return BEGIN


def with_rules(store, text):
    create_store(store, clock=clock)
    store.put(".ckptcoord/repo.yaml", f"format_version: 1\n{text}".encode())
    return store


def test_a_repository_has_rules_of_its_own():
    rules = "retention:\n  keep_last: 3\n  keep_best: 1\n  metric: acc\n  keep_for: 7d\n"
    found = open_store(with_rules(MemoryStore(), rules), clock=clock).retention
    assert found == Retention(keep_last=3, keep_best=1, metric="acc", keep_for_s=7 * 86400)
    for none in ("", "retention:\n", "retention: {}\n"):
        store = with_rules(MemoryStore(), none)
        assert not open_store(store, clock=clock).retention.has_rules


@pytest.mark.parametrize(
    "text",
    [
        "retention: 3",
        "retention: {keep_lost: 1}",
        "retention: {keep_last: 0}",
        "keep_last: 3",
        "3: 3",
    ],
)
def test_rules_that_make_no_sense_are_refused_by_name(text):
    store = with_rules(MemoryStore(), text)
    with pytest.raises(ManifestError, match=r"repo\.yaml"):
        open_store(store, clock=clock)


def test_what_the_config_says_goes_before_what_the_repository_says(tmp_path):
    with_rules(LocalStore(tmp_path), "retention: {keep_last: 1, keep_every: 10}")
    components = [StateComponent("s", {"n": 1}, SharingPattern.GLOBAL)]

    def steps_after(config, steps):
        with CheckpointCoordinator(components, output_dir=tmp_path, config=config) as coordinator:
            for step in steps:
                coordinator.save_checkpoint(step=step)
        return sorted(one.step for one in open_repository(tmp_path).state().commits)

    assert steps_after(CoordinatorConfig(), (10, 11, 12)) == [10, 12]
    assert steps_after(CoordinatorConfig(keep_last=2), (13,)) == [10, 12, 13]
    rules = CoordinatorConfig(retention=Retention(keep_every=12))
    assert steps_after(rules, (14,)) == [12, 14]


def test_a_config_takes_rules_in_either_form():
    assert CoordinatorConfig(keep_last=2).retention == Retention(keep_last=2)
    both = CoordinatorConfig(keep_last=2, retention=Retention(keep_every=5))
    assert both.retention == Retention(keep_last=2, keep_every=5)
    assert replace(both, branch="exp").retention == both.retention
    with pytest.raises(ConfigError, match="keep_last"):
        CoordinatorConfig(keep_last=2, retention=Retention(keep_last=3))


# --- the plan as a law -------

NONCES = [f"{number:032x}" for number in range(8)]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_nothing_live_needed_young_or_unknown_is_ever_doomed(data):
    world = World()
    paths = [world.save(0)]
    for step in range(1, data.draw(st.integers(1, 5))):
        needs = data.draw(st.sets(st.sampled_from(paths), max_size=2))
        paths.append(world.save(step, needs=needs))
    if len(paths) > 1:
        gone = data.draw(st.sets(st.integers(0, len(paths) - 2), max_size=3))
        if gone:
            world.retire(*sorted(gone))
    state = world.state()
    attempts = [one.attempt for one in state.commits.values()]
    folder = st.builds(
        Folder,
        path=st.sampled_from(
            [
                *paths,
                "checkpoint-77",
                *(f"{STAGING}/{n}{e}" for n in NONCES for e in ("", "-swept")),
            ]
        ),
        attempt=st.none() | st.sampled_from([*attempts, *NONCES]),
        unreadable=st.sampled_from(["", "", "odd"]),
        changed_s=st.none()
        | st.floats(-3, 3).map(lambda d: world.now.timestamp() + d * ABANDONED_S),
        size_bytes=st.integers(0, 9),
    )
    folders = data.draw(st.lists(folder, max_size=8, unique_by=lambda one: one.path))
    names = data.draw(st.none() | st.just(frozenset(paths)))
    grace_s = data.draw(st.sampled_from([0.0, 60.0, 2 * ABANDONED_S]))
    plan = plan_gc(
        state, Listing(names=names, folders=tuple(folders)), now=world.now, grace_s=grace_s
    )
    by_path = {one.path: one for one in folders}
    for doomed in plan.doomed:
        assert doomed.path not in live_folders(state)
        assert doomed.attempt not in attempts
        seen = by_path.get(doomed.path)
        if seen is None or doomed.why is Why.RETIRED:
            assert doomed.path in state.retired
            continue
        assert not seen.unreadable
        age_s = 0 if seen.changed_s is None else world.now.timestamp() - seen.changed_s
        if doomed.why is not Why.SWEPT or grace_s:  # a sweep with no grace asks for no age
            assert age_s >= (grace_s if doomed.why is Why.SWEPT else max(grace_s, ABANDONED_S))
    judged = [one.path for part in (plan.doomed, plan.kept, plan.restored) for one in part]
    assert len(judged) == len(set(judged))
