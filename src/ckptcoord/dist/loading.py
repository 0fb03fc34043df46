"""One load, step by step (docs/protocol.md)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptcoord.core.entries import Commit
from ckptcoord.core.jsonio import JsonValue, parse_json
from ckptcoord.core.manifest import TENSOR_KINDS, ComponentManifest, FileKind, FileRecord
from ckptcoord.core.sharing import ComponentSpec, SharingPattern, StateComponent
from ckptcoord.core.topology import Topology
from ckptcoord.core.tree import MAX_STATE_BYTES, LeafKind, leaf_forms
from ckptcoord.dist.messages import as_dict, document_of, same_on_all
from ckptcoord.dist.nodecheck import NodeCheck
from ckptcoord.dist.restore import (
    Fit,
    apply,
    build,
    compare,
    count_change,
    empty_like,
    fillable,
    memory_of,
    unshared,
)
from ckptcoord.dist.session import Session, heard
from ckptcoord.dist.shardset import ShardSet, Source, Want, key_of
from ckptcoord.errors import (
    CkptError,
    CorruptError,
    LoadAbortedError,
    ManifestError,
    StateMismatchError,
    StorageError,
)
from ckptcoord.plan.placement import scope_of, state_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ckptcoord.core.topology import Scope


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


@dataclass(slots=True, kw_only=True)
class _Plan:
    """How one component will be read: what is `live` in place, all else into new `tensors`."""

    component: StateComponent
    fit: Fit
    tree: JsonValue
    path: str
    sources: dict[str, Source]
    live: dict[str, torch.Tensor]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: object = None


def load(session: Session, ask: Callable[[], str], *, strict: bool) -> LoadReport:
    """Load every component from the checkpoint that a ref names, on all ranks or on none.

    Args:
        session: of the coordinator.
        ask: gives the ref. What it raises is heard on all ranks.
        strict: refuse what does not fit.

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
            ref if isinstance(ref, CkptError) else {"ref": ref, "strict": bool(strict)},
            lambda said: _resolve(session, said),
            deadline=session.deadline(),
        )
    )
    with ShardSet(session.repository, commit) as shards:
        loader = _Loader(session, commit, shards, strict=strict)
        session.step("plan")
        _agree(session, "plan", loader.plan)
        session.step("check")
        _agree(session, "check", loader.check)
        session.step("read")
        _agree(session, "read", loader.read)
        session.step("apply")
        _agree(session, "apply", loader.apply)
    return loader.report(time.monotonic() - started_s)


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
    for name in ("ref", "strict"):
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

    def __init__(self, session: Session, commit: Commit, shards: ShardSet, *, strict: bool) -> None:
        self._session = session
        self._repository = session.repository
        self._commit = commit
        self._shards = shards
        self._strict = strict
        self._plans: list[_Plan] = []
        self._in_place: list[Want] = []
        self._beside: list[Want] = []
        self._checks = NodeCheck(session, shards)
        self._skipped: dict[str, str] = {}
        self._missing: list[str] = []
        self._unexpected: list[str] = []
        self._mismatched: list[str] = []
        self._bytes_read = 0

    def plan(self) -> None:
        """Read manifest, documents and headers; compare with what is live."""
        self._manifest = self._repository.manifest(self._commit)
        self._shards.vouch(self._manifest.files)
        for component in self._session.components:
            self._plan_component(component)
        declared = {component.key for component in self._session.components}
        undeclared = sorted(set(self._manifest.components) - declared)
        if self._strict and (self._missing or self._unexpected or self._mismatched):
            raise StateMismatchError(
                checkpoint=self._commit.path,
                missing=tuple(self._missing),
                unexpected=tuple(self._unexpected),
                mismatched=tuple(self._mismatched),
            )
        self._unexpected += undeclared

    def check(self) -> None:
        """Hold what is read in place to its digests (INV-9), what a node shares once a node."""
        alone = unshared([plan.live for plan in self._plans])
        for plan, live in zip(self._plans, alone, strict=True):
            plan.live = live
            mates = self._checks.mates(plan.component)
            for name, source in plan.sources.items():
                self._bytes_read += source[1].spec.nbytes
                if name in live:
                    plan.tensors[name], out = live[name], memory_of(live[name])
                    self._in_place.append((source, out))
                else:
                    plan.tensors[name], out = empty_like(source[1].spec)
                    self._beside.append((source, out))
                    if len(mates) == 1 or source[0].kind is FileKind.DELTA:
                        continue  # reading it checks it
                self._checks.add((source, out), mates)
        self._checks.run()

    def read(self) -> None:
        """Read what has no live memory to go to."""
        self._checks.hear(self._in_place)
        known = self._checks.found
        threads = self._session.config.io_threads
        self._shards.fill([w for w in self._beside if key_of(w) in known], known, threads=threads)
        self._shards.read([w for w in self._beside if key_of(w) not in known], threads=threads)
        for plan in self._plans:
            plan.state = build(plan.tree, plan.tensors, plan.path)
            plan.tensors = {}

    def apply(self) -> None:
        """INV-8: every rank can read all it needs; now the live state may change, RNG last."""
        threads = self._session.config.io_threads
        try:
            self._shards.fill(self._in_place, self._checks.found, threads=threads)
        except (CorruptError, StorageError) as error:
            raise _overwritten(error) from error
        for plan in self._plans:
            count_change(plan.live.values())
        last = [p for p in self._plans if getattr(p.component.stateful, "restore_last", False)]
        for plan in [p for p in self._plans if p not in last] + last:
            state, plan.state = plan.state, None
            apply(plan.component, state, fit=plan.fit)

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
        saved = self._manifest.components.get(component.key)
        why = "" if saved else "the checkpoint does not have it"
        scope = None
        if saved is not None:
            scope, why = self._saved_scope(component, saved)
        if scope is None:
            self._skipped[component.key] = why
            if component.required:
                self._missing.append(f"{component.key} ({why})")
            return
        plan = self._open(component, scope)
        if plan.fit.other_kind:
            self._skipped[component.key] = plan.fit.other_kind
        else:
            self._plans.append(plan)
        self._missing += plan.fit.missing
        self._unexpected += plan.fit.unexpected
        self._mismatched += plan.fit.mismatched

    def _saved_scope(
        self, component: StateComponent, saved: ComponentManifest
    ) -> tuple[Scope | None, str]:
        """Which of the saved copies is this rank's, or why none is."""
        rank, world = self._session.world.rank, self._session.topology.world_size
        pattern = saved.sharing_pattern
        job_wide = (SharingPattern.GLOBAL, SharingPattern.REPLICATED)
        if pattern in job_wide and component.sharing_pattern in job_wide:
            # Any number of ranks reads the one copy; its name does not depend on the topology.
            alone = Topology.single_node(1)
            return scope_of(ComponentSpec(key=component.key, pattern=pattern), alone, 0), ""
        if pattern is not component.sharing_pattern:
            return None, f"it was saved {pattern.name} and is {component.sharing_pattern.name} now"
        saved_world = self._manifest.world_size
        if world != saved_world:
            return None, f"it is {pattern.name}, saved by {saved_world} ranks and loaded by {world}"
        # Not before: a short text can name a million ranks. Of ours, there are only so many.
        topology = self._manifest.topology.to_topology()
        spec = ComponentSpec(key=component.key, pattern=pattern, group_name=saved.group_name)
        scope = scope_of(spec, topology, rank)
        if scope.readers != self._session.scope(component).readers:
            return None, (
                f"ranks {scope.readers} shared this copy, and rank {rank} shares it with "
                f"{self._session.scope(component).readers} now"
            )
        return scope, ""

    def _open(self, component: StateComponent, scope: Scope) -> _Plan:
        records = [
            record
            for record in self._manifest.files
            if (record.component, record.scope) == (component.key, scope.label)
        ]
        sources = self._shards.sources(r for r in records if r.kind in TENSOR_KINDS)
        tree, path = self._document(component, scope, {record.path: record for record in records})
        names = {n: form.kind for n, form in leaf_forms(tree, path=path).items()}
        absent = sorted(set(names) - set(sources))
        if absent:
            raise ManifestError(path=path, why=f"names {absent[0]!r}, which no shard holds")
        wanted = {name: sources[name] for name in names}
        specs = {name: entry.spec for name, (_, entry) in wanted.items()}
        return _Plan(
            component=component,
            fit=compare(component, specs, tree),
            tree=tree,
            path=path,
            sources=wanted,
            # An array is built from its stored form, which need not be its memory.
            live=fillable(
                component, {n: s for n, s in specs.items() if names[n] is LeafKind.TENSOR}
            ),
        )

    def _document(
        self, component: StateComponent, scope: Scope, records: Mapping[str, FileRecord]
    ) -> tuple[JsonValue, str]:
        own = state_path(component.key, scope, self._session.world.rank)
        name = own if own in records else state_path(component.key, scope)
        path = f"{self._commit.path}/{name}"
        if name not in records:
            raise ManifestError(path=path, why="is not in the manifest")
        data = self._repository.read_document(self._commit, records[name])
        document = parse_json(data, path=path, max_bytes=MAX_STATE_BYTES)
        if not isinstance(document, dict) or document.get("component") != component.key:
            raise ManifestError(path=path, why=f"is not the state of {component.key!r}")
        if document.get("format_version") != 1 or "tree" not in document:
            raise ManifestError(path=path, why="has no tree, or another format version")
        return document["tree"], path
