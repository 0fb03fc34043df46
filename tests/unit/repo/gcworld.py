"""A writer that leaves on a store what a save leaves, and the law that gc must keep."""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime, timedelta

from ckptcoord.core.digest import Digest
from ckptcoord.core.entries import Commit, Retire
from ckptcoord.core.refs import BranchName, CheckpointId
from ckptcoord.plan.commit import STAGING, taken_folders
from ckptcoord.repo.repository import Repository, create_store
from ckptcoord.store.memory import MemoryStore

MAIN = BranchName()
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
MANIFEST = "checkpoint_manifest.json"


def cid(step, branch=MAIN):
    return CheckpointId(branch, step)


class World:
    """One process: a repository of its own on a store, at a time that the test sets."""

    def __init__(self, store=None, *, writer=None):
        self.now = BEGIN
        self.ages_s = {}
        self.writer = writer or secrets.token_hex(16)
        self.repository = create_store(store or MemoryStore(), clock=lambda: self.now)
        self.store = self.repository.store
        self.epoch = 0

    def move_to(self, store):
        """Go on with another way to the same files."""
        self.store = store
        self.repository = Repository(store, clock=lambda: self.now)

    def pass_time(self, **span):
        self.now += timedelta(**span)

    def changed(self, path):
        """As old as the test says; else from the beginning."""
        age = self.ages_s.get(path)
        return BEGIN.timestamp() if age is None else self.now.timestamp() - age

    def state(self):
        return self.repository.state()

    def claim(self, branch=MAIN):
        self.epoch = self.repository.claim(branch, writer=self.writer, world_size=1, host="h")

    def write(self, folder, attempt=None, *, manifest=True):
        """Files as of an attempt."""
        attempt = attempt or secrets.token_hex(16)
        self.store.make_dirs(folder)
        self._file(f"{folder}/model.safetensors", attempt.encode())
        if manifest:
            document = {"attempt": attempt, "files": ["model.safetensors"]}
            self._file(f"{folder}/{MANIFEST}", json.dumps(document).encode())
        return attempt

    def _file(self, path, data):
        with self.store.create(path) as writer:
            writer.write_at(0, data)
            writer.sync()
        self.store.sync_dir(path.rpartition("/")[0])

    def stage(self, *, manifest=False):
        """An attempt that is under way, or was killed."""
        attempt = secrets.token_hex(16)
        return self.write(f"{STAGING}/{attempt}", attempt, manifest=manifest)

    def publish(self, attempt, step):
        """Move it to its final name, as `Attempt.publish` does."""
        name = str(cid(step))
        if name in taken_folders(self.state()) or self.store.exists(name):
            name = f"{name}.{attempt[:8]}"
        self.store.move_dir(f"{STAGING}/{attempt}", name)
        return name

    def commit(self, attempt, step, path, needs=()):
        def make(state):
            old = state.commits.get(cid(step))
            return Commit(
                writer=self.writer,
                checkpoint_id=cid(step),
                path=path,
                manifest_digest=Digest(bytes(32)),
                epoch=self.epoch,
                attempt=attempt,
                size_bytes=1,
                stored_bytes=1,
                replaces=None if old is None else old.path,
                needs=tuple(sorted(needs)),
            )

        self.repository.log.append(make)

    def save(self, step, *, needs=()):
        """A whole save; returns its folder."""
        if not self.epoch:
            self.claim()
        attempt = self.stage(manifest=True)
        path = self.publish(attempt, step)
        self.commit(attempt, step, path, needs)
        return path

    def retire(self, *steps):
        ids = tuple(map(cid, steps))
        self.repository.log.append(lambda _: Retire(writer=self.writer, checkpoint_ids=ids))

    def folders(self):
        return {one.name for one in self.store.list("") if one.name.startswith("checkpoint-")}

    def staged(self):
        return {one.name for one in self.store.list(STAGING)}


def check_live(store):
    """INV-5: every live checkpoint, and every one that it needs, holds its own files."""
    world = World(store)
    state = world.state()
    attempts = {one.path: one.attempt for one in state.commits.values()}
    attempts |= {path: one.commit.attempt for path, one in state.retired.items()}
    for commit in state.commits.values():
        for path in (commit.path, *commit.needs):
            attempt = attempts[path].encode()
            assert store.read(f"{path}/model.safetensors", limit_bytes=99) == attempt
            assert attempt in store.read(f"{path}/{MANIFEST}", limit_bytes=999)
    return state
