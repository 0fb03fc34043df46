"""One load, step by step (docs/protocol.md)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ckptcoord.core.entries import Commit
from ckptcoord.core.manifest import FileKind
from ckptcoord.core.sharing import OnWorldSizeChange
from ckptcoord.dist.destinations import beside_live, wants_for
from ckptcoord.dist.loadplan import LeftOut, LoadPlan, LoadPlanner
from ckptcoord.dist.messages import as_dict, document_of, same_on_all
from ckptcoord.dist.nodecheck import NodeCheck
from ckptcoord.dist.readonce import SharedReads
from ckptcoord.dist.restore import (
    apply,
    build,
    check_state,
    count_change,
    derive,
    unshared,
)
from ckptcoord.dist.session import Session, heard
from ckptcoord.dist.shardset import ShardSet, Want, key_of
from ckptcoord.errors import (
    CkptError,
    CorruptError,
    LoadAbortedError,
    StateMismatchError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.saved import SavedTensor

_UNPLACED = (
    "nothing live says which part of it is this rank's, and its saved pieces do not cover all of it"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a load did on this rank.

    Attributes:
        checkpoint_id: `checkpoint-500`.
        path: of its folder, absolute.
        step: its step.
        metrics: those it was saved with.
        loaded: the components that were loaded.
        skipped: component to reason, for those that were not.
        missing: live names that the checkpoint does not have.
        unexpected: names, or components, in the checkpoint that nothing live asks for.
        mismatched: names whose shape or dtype differs.
        bytes_read: of tensors, by this rank.
        seconds: from the call to the end.
    """

    checkpoint_id: str
    path: str
    step: int
    metrics: Mapping[str, float]
    loaded: tuple[str, ...]
    skipped: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    bytes_read: int
    seconds: float


def load(
    session: Session,
    ask: Callable[[], str],
    *,
    strict: bool,
    read_once: bool = False,
    permit: Callable[[Commit], None] | None = None,
) -> LoadReport:
    """Load every component from the checkpoint that a ref names, on all ranks or on none.

    Args:
        session: of the coordinator.
        ask: gives the ref. What it raises is heard on all ranks.
        strict: refuse what does not fit.
        read_once: what several ranks want, one of them reads and sends to the others.
        permit: given on all ranks or on none; called on rank 0 when every rank is ready, and before
            anything changes. What it raises ends the load on all of them.

    Raises:
        StateMismatchError: it does not fit; all missing, unexpected and mismatched names together.
        LoadAbortedError: some rank could not read its part or fell silent.
        CkptError: what every rank said alike.
    """
    started_s = time.monotonic()
    world = session.world
    ref = heard(ask)
    world.begin(LoadAbortedError, "" if isinstance(ref, CkptError) else ref)
    session.step("resolve")
    commit = Commit.from_json(
        world.agree(
            "resolve",
            _word(ref, strict=strict, read_once=read_once),
            lambda said: _resolve(session, said),
            deadline=session.deadline(),
        )
    )
    with ShardSet(session.repository, commit) as shards:
        loader = _Loader(session, commit, shards, strict=strict, read_once=read_once)
        session.step("plan")
        _agree(session, "plan", loader.plan)
        session.step("check")
        _agree(session, "check", loader.check)
        session.step("read")
        _agree(session, "read", loader.read)
        if permit is not None:
            world.agree(
                "permit", None, partial(_permit, permit, commit), deadline=session.deadline()
            )
        session.step("apply")
        _agree(session, "apply", loader.apply)
    return loader.report(time.monotonic() - started_s)


def _permit(permit: Callable[[Commit], None], commit: Commit, _: list[JsonValue]) -> None:
    permit(commit)


def _word(ref: str | CkptError, *, strict: bool, read_once: bool) -> JsonValue | CkptError:
    if isinstance(ref, CkptError):
        return ref
    return {"ref": ref, "strict": bool(strict), "read_once": bool(read_once)}


def _agree(session: Session, phase: str, work: Callable[[], None]) -> None:
    """One phase on all ranks; damage that any of them found is the same error on all of them."""
    word = heard(work)
    said: JsonValue | CkptError = word
    # Once live state has changed, that is what the error has to say.
    if isinstance(word, CorruptError) and phase != "apply":
        said = {"damage": document_of(word)}
    try:
        session.world.agree(phase, said, _raise_damage, deadline=session.deadline())
    except CorruptError as error:
        raise error from word


def _raise_damage(said: list[JsonValue]) -> None:
    """Rank 0 raises the first damage that was found, with the rank that found it.

    Ranks of a node share the work of checking: usually only one of them has seen it.
    """
    found = {rank: as_dict(word)["damage"] for rank, word in enumerate(said) if word is not None}
    if not found:
        return
    first, damage = next(iter(found.items()))
    document = as_dict(damage)
    if len(found) < len(said):
        document["what"] = f"{document['what']} (found by rank {first})"
    raise CkptError.from_document(document)


def _resolve(session: Session, said: list[JsonValue]) -> JsonValue:
    """Rank 0 turns the ref into a commit, once for all."""
    for name in ("ref", "strict", "read_once"):
        same_on_all(name, [as_dict(word)[name] for word in said])
    return session.repository.resolve(str(as_dict(said[0])["ref"])).to_json()


def _overwritten(error: CkptError) -> CkptError:
    """The same error, of a live tensor that was being filled."""
    document = error.to_document()
    document["what"] = (
        f"{error.what}; live tensors were being filled, and some hold other values now"
    )
    document["help"] = "Load again, or an earlier checkpoint (`ckptcoord log`), before you go on"
    return CkptError.from_document(document)


class _Loader:
    """This rank's part of one load."""

    def __init__(
        self,
        session: Session,
        commit: Commit,
        shards: ShardSet,
        *,
        strict: bool,
        read_once: bool,
    ) -> None:
        self._session = session
        self._repository = session.repository
        self._commit = commit
        self._shards = shards
        self._strict = strict
        self._read_once = read_once
        self._shared: SharedReads | None = None
        self._plans: list[LoadPlan] = []
        self._in_place: list[Want] = []
        self._beside: list[Want] = []
        self._checks = NodeCheck(session, shards)
        self._derived: list[StateComponent] = []
        self._skipped: dict[str, str] = {}
        self._missing: list[str] = []
        self._unexpected: list[str] = []
        self._mismatched: list[str] = []
        self._bytes_read = 0

    def plan(self) -> None:
        """Read manifest, documents and headers; compare with what is live."""
        self._manifest = self._repository.manifest(self._commit)
        self._shards.vouch(self._manifest)
        self._planner = LoadPlanner(self._session, self._commit, self._manifest, self._shards)
        for component in self._session.components:
            self._plan_component(component)
        declared = {component.key for component in self._session.components}
        undeclared = sorted(set(self._manifest.components) - declared)
        unplaced = [
            f"{plan.component.key}.{name}: {_UNPLACED}"
            for plan in self._plans
            for name in plan.unplaced
        ]
        self._mismatched += unplaced
        if unplaced or (self._strict and (self._missing or self._unexpected or self._mismatched)):
            raise StateMismatchError(
                checkpoint=self._commit.path,
                missing=tuple(self._missing),
                unexpected=tuple(self._unexpected),
                mismatched=tuple(self._mismatched),
            )
        self._unexpected += undeclared
        self._place()

    def _place(self) -> None:
        """Decide where each tensor is read to, and let others know what is wanted of it."""
        # What is read once cannot be checked first: it is read beside.
        able = [{} if self._read_once else plan.in_place for plan in self._plans]
        for plan, in_place in zip(self._plans, unshared(able), strict=True):
            plan.in_place = in_place
            for name, saved in plan.saved.tensors.items():
                if name in plan.kept:
                    continue
                if name not in in_place and name not in plan.beside:
                    plan.beside[name] = beside_live(plan.live, saved, name)
                where = in_place if name in in_place else plan.beside
                wants = wants_for(saved, where[name].pieces)
                self._bytes_read += sum(entry.spec.nbytes for (_, entry), _ in wants)
                (self._in_place if name in in_place else self._beside).extend(wants)
                for want in wants:
                    self._plan_check(plan.component, saved, want, first=name in in_place)
        if self._read_once:
            self._shared = SharedReads(self._session, self._shards, self._beside)
            self._shared.announce()
        else:
            self._checks.announce()

    def _plan_check(
        self, component: StateComponent, saved: SavedTensor, want: Want, *, first: bool
    ) -> None:
        (record, _), _ = want
        if not first and record.kind is FileKind.DELTA:
            return  # reading it checks it
        if saved.form.shape is None:
            self._checks.add(component, want, first=first)
        else:
            self._checks.add_part(want, first=first)

    def check(self) -> None:
        """Hold what is read in place to its digests (INV-9), what a node shares once a node."""
        if not self._read_once:
            self._checks.run()

    def read(self) -> None:
        """Read what has no live memory to go to."""
        if self._shared is not None:
            self._bytes_read = self._shared.read()
        else:
            self._read_checked()
        for plan in list(self._plans):
            stays = (*plan.in_place, *plan.kept)
            leaves = {name: plan.live.values[name] for name in stays}
            for name, one in plan.beside.items():
                leaves[name] = one.value()
                plan.late += one.late(leaves[name])
            plan.state = build(plan.saved.tree, leaves, plan.saved.path)
            plan.beside = {}
            self._let_refuse(plan)

    def _let_refuse(self, plan: LoadPlan) -> None:
        """A state that says nothing on another number of ranks is skipped where so declared."""
        component = plan.component
        try:
            check_state(component, plan.state)
        except CkptError as error:
            moved = self._manifest.world_size != self._session.world.size
            skips = component.on_world_size_change is OnWorldSizeChange.SKIP
            if not (moved and skips) or plan.in_place:
                raise
            self._skipped[component.key] = str(error)
            self._plans.remove(plan)

    def _read_checked(self) -> None:
        self._checks.hear(self._in_place)
        known = self._checks.found
        threads = self._session.config.io_threads
        self._shards.fill([w for w in self._beside if key_of(w) in known], known, threads=threads)
        self._shards.read([w for w in self._beside if key_of(w) not in known], threads=threads)

    def apply(self) -> None:
        """INV-8: every rank can read all it needs; now the live state may change, RNG last."""
        threads = self._session.config.io_threads
        try:
            self._shards.fill(self._in_place, self._checks.found, threads=threads)
        except (CorruptError, StorageError) as error:
            raise _overwritten(error) from error
        for plan in self._plans:
            count_change(t for one in plan.in_place.values() for _, t in one.pieces)
        last = [p for p in self._plans if getattr(p.component.stateful, "restore_last", False)]
        for plan in [p for p in self._plans if p not in last] + last:
            state, plan.state = plan.state, None
            with torch.no_grad():
                for live, read in plan.late:
                    live.copy_(read)
            apply(plan.component, state, fit=plan.fit)
        for component in self._derived:
            derive(component, self._commit.checkpoint_id.step, self._session.world.rank)

    def report(self, seconds: float) -> LoadReport:
        """What was done."""
        return LoadReport(
            checkpoint_id=str(self._commit.checkpoint_id),
            path=f"{self._repository.url}/{self._commit.path}",
            step=self._commit.checkpoint_id.step,
            metrics=dict(self._manifest.metrics),
            loaded=tuple(plan.component.key for plan in self._plans),
            skipped=dict(self._skipped),
            missing=tuple(self._missing),
            unexpected=tuple(self._unexpected),
            mismatched=tuple(self._mismatched),
            bytes_read=self._bytes_read,
            seconds=seconds,
        )

    def _plan_component(self, component: StateComponent) -> None:
        plan = self._planner.plan(component)
        if isinstance(plan, LeftOut):
            self._skipped[component.key] = plan.why
            if plan.missing:
                self._missing.append(f"{component.key} ({plan.why})")
            if plan.derives:
                self._derived.append(component)
            return
        if plan.fit.other_kind:
            self._skipped[component.key] = plan.fit.other_kind
        else:
            self._plans.append(plan)
        self._missing += plan.fit.missing
        self._unexpected += plan.fit.unexpected
        self._mismatched += plan.fit.mismatched
