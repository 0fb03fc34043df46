"""Two gcs beside savers: whatever the order, what is live is whole (INV-5)."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.unit.repo.gcworld import BEGIN, World, check_live

from ckptcoord.errors import AttemptSweptError, BaseGoneError, StorageError
from ckptcoord.plan.commit import live_folders
from ckptcoord.plan.sweeping import ABANDONED_S
from ckptcoord.repo.maintenance import prepare_gc, run_gc
from ckptcoord.store.local import LocalStore
from ckptcoord.store.memory import MemoryStore

SAVES = 40


class Unsteady:
    """A store whose every call may let other threads go first."""

    def __init__(self, inner, seed):
        self._inner, self._random = inner, random.Random(seed)

    def __getattr__(self, name):
        found = getattr(self._inner, name)
        if not callable(found):
            return found

        def unsteady(*args, **kwargs):
            if self._random.random() < 0.3:
                time.sleep(self._random.random() / 2000)
            return found(*args, **kwargs)

        return unsteady


def save_on(world, steps, outcomes):
    """Saves, each with the one before as its base at times; each but the newest retired."""
    rng, last = random.Random(7), None
    for step in steps:
        needs = [last] if last and rng.random() < 0.5 else []
        if last:
            needs += [one for one in needs_of(world, last) if needs]
        try:
            last = world.save(step, needs=set(needs))
            outcomes.append("saved")
        except (AttemptSweptError, BaseGoneError, StorageError) as error:
            outcomes.append(type(error).__name__)
            last = None
        live = sorted(world.state().commits)
        if len(live) > 1:
            world.retire(*(one.step for one in live[:-1]))


def needs_of(world, path):
    state = world.state()
    commits = [*state.commits.values(), *(one.commit for one in state.retired.values())]
    return next((one.needs for one in commits if one.path == path), ())


def gc_until(world, done, *, unknown_is_old, runs):
    world.now = BEGIN
    old_s = BEGIN.timestamp() - 2 * ABANDONED_S
    while True:
        last_round = done.is_set()
        dead = last_round or (unknown_is_old and len(runs) % 3 == 0)
        changed = old_s if dead else BEGIN.timestamp()
        gc = prepare_gc(
            world.repository, now=world.now, changed=lambda _, at=changed: at, grace_s=0
        )
        runs.append(run_gc(world.repository, gc, writer=world.writer))
        if last_round:
            return


@pytest.fixture(params=["memory", "local"])
def reopen(request, tmp_path):
    """A store as another process would have it."""
    memory = MemoryStore()
    return (lambda: memory) if request.param == "memory" else (lambda: LocalStore(tmp_path))


def run_beside(works):
    """Run all in threads of their own; raise what any of them raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for future in [pool.submit(work) for work in works]:
            future.result(60)


@pytest.mark.parametrize("unknown_is_old", [False, True], ids=["in peace", "taken for dead"])
def test_two_gcs_and_a_saver_leave_every_live_checkpoint_whole(reopen, unknown_is_old):
    """`taken for dead`: gc takes running saves for dead, the worst that clocks can do."""
    World(reopen())
    done, outcomes, runs = threading.Event(), [], []

    def saver():
        try:
            save_on(World(Unsteady(reopen(), 1)), range(SAVES), outcomes)
        finally:
            done.set()

    def collector(seed):
        world = World(Unsteady(reopen(), seed))
        gc_until(world, done, unknown_is_old=unknown_is_old, runs=runs)

    def watcher():
        store = reopen()
        while not done.wait(0.002):
            check_owned(store)

    run_beside([saver, lambda: collector(2), lambda: collector(3), watcher])

    assert len(outcomes) == SAVES
    assert unknown_is_old or "saved" in outcomes
    assert unknown_is_old or set(outcomes) <= {"saved", "BaseGoneError"}
    assert any(run.deleted for run in runs)
    state = check_live(reopen())
    assert World(reopen()).folders() == live_folders(state)


def check_owned(store):
    """What is live in one state of the log, and still so in a later one, was there in between."""
    world = World(store)
    before = world.state()
    present = {one.name for one in store.list("")}
    after = world.state()
    for one in before.commits.values():
        if after.commits.get(one.checkpoint_id) == one:
            assert {one.path, *one.needs} <= present
