"""From which of the saved copies a component is loaded, and how (ADR 11)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptcoord.core.sharing import (
    ComponentSpec,
    OnWorldSizeChange,
    SharingPattern,
    StateComponent,
)
from ckptcoord.core.topology import Scope, ScopeKind, Topology
from ckptcoord.core.treemerge import MergeConflictError, has_keys, leaf_keys, prune_document
from ckptcoord.dist.destinations import Destination, new_destination
from ckptcoord.dist.restore import (
    Fit,
    Live,
    compare,
    fillable,
    kept_as_live,
    live_of,
    misfits,
    other_kind,
    wants_of,
)
from ckptcoord.dist.union import SavedComponent, SavedState
from ckptcoord.errors import ManifestError
from ckptcoord.plan.placement import scope_of, state_path

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.manifest import CheckpointManifest, ComponentManifest, FileRecord
    from ckptcoord.dist.session import Session
    from ckptcoord.dist.sharded import Layout
    from ckptcoord.dist.shardset import ShardSet

_PARTS = frozenset({SharingPattern.PER_RANK, SharingPattern.PER_GROUP})
"""Of what is declared so, a rank may hold a part."""


@dataclass(slots=True, kw_only=True)
class LoadPlan:
    """How one component will be read.

    Attributes:
        component: which.
        fit: how what was saved compares with what is live.
        saved: what there is to read.
        live: the component as it is live.
        in_place: the live tensors that are filled where they are.
        kept: those that stay as they are, as nothing that was saved fits them.
        beside: all others, with new memory to read them into; of those that are live, it is made
            when it is known which are filled in place.
        unplaced: names of which the saved pieces do not fill what this rank would hold.
        state: once it is built.
        late: live memory of tensors in it, and what that is to hold.
    """

    component: StateComponent
    fit: Fit
    saved: SavedState
    live: Live = field(default_factory=Live)
    in_place: dict[str, Layout] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()
    beside: dict[str, Destination] = field(default_factory=dict)
    unplaced: tuple[str, ...] = ()
    state: object = None
    late: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @property
    def suits(self) -> bool:
        """Whether this has all that the live component holds, or would hold."""
        by_name = hasattr(self.component.stateful, "wants_state")
        return (
            self.fit.perfect
            and not self.unplaced
            and (not by_name or has_keys(self.saved.tree, self.live.document))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A component that is not loaded.

    Attributes:
        why: for people.
        missing: it should have been.
        derives: this rank is new, and what it holds may make a state of its own.
    """

    why: str
    missing: bool = False
    derives: bool = False


class LoadPlanner:
    """Plans what this rank reads of a checkpoint.

    Args:
        session: of the coordinator.
        commit: of the checkpoint.
        manifest: of it.
        shards: open files of it.
    """

    def __init__(
        self, session: Session, commit: Commit, manifest: CheckpointManifest, shards: ShardSet
    ) -> None:
        self._session = session
        self._commit = commit
        self._manifest = manifest
        self._shards = shards

    def plan(self, component: StateComponent) -> LoadPlan | LeftOut:
        """How a component is read, or why it is not.

        Raises:
            ManifestError, CorruptError, StorageError: what was saved of it cannot be read.
            CkptError: its live state cannot be.
        """
        saved = self._manifest.components.get(component.key)
        if saved is None:
            why = "the checkpoint does not have it"
            return LeftOut(why=why, missing=component.required)
        try:
            return self._choose(component, saved)
        except MergeConflictError as error:
            skips = component.on_world_size_change is OnWorldSizeChange.SKIP
            why = f"{self._change(component, saved)}, and {error}"
            return LeftOut(why=why, missing=component.required and not skips)

    def _choose(self, component: StateComponent, saved: ComponentManifest) -> LoadPlan | LeftOut:
        """From which of the saved copies a component is loaded; or from none, as declared.

        Raises:
            MergeConflictError: the copies are none of this rank's, and differ.
        """
        scope = self._own_copy(component, saved)
        if scope is not None:
            plan = self._open(component, scope)
            if plan.suits or component.sharing_pattern not in _PARTS:
                return plan
            try:  # as many ranks as before may hold other parts than before
                union = self._open(component, None)
            except MergeConflictError:
                return plan
            return union if union.suits else plan
        if component.on_world_size_change is OnWorldSizeChange.OWN:
            return self._own(component, saved)
        return self._open(component, None)

    def _own(self, component: StateComponent, saved: ComponentManifest) -> LoadPlan | LeftOut:
        """What this rank saved; what all copies have alike is everyone's."""
        rank = self._session.world.rank
        new = LeftOut(why=f"{self._change(component, saved)}: this rank is new", derives=True)
        if saved.sharing_pattern is SharingPattern.PER_RANK:
            if rank < self._manifest.world_size:
                return self._open(component, _scope_of_rank(rank))
            return new
        scope = self._session.scope(component)
        if saved.sharing_pattern is SharingPattern.PER_NODE and scope.kind is ScopeKind.NODE:
            labels = {r.scope for r in self._manifest.files if r.component == component.key}
            return self._open(component, scope) if scope.label in labels else new
        try:
            return self._open(component, None)
        except MergeConflictError:
            return new

    def _change(self, component: StateComponent, saved: ComponentManifest) -> str:
        return (
            f"it was saved {saved.sharing_pattern.name} by {self._manifest.world_size} ranks and "
            f"is {component.sharing_pattern.name} on {self._session.world.size} now"
        )

    def _own_copy(self, component: StateComponent, saved: ComponentManifest) -> Scope | None:
        """The copy that was saved by just the ranks that share it now."""
        rank, world = self._session.world.rank, self._session.topology.world_size
        pattern = saved.sharing_pattern
        job_wide = (SharingPattern.GLOBAL, SharingPattern.REPLICATED)
        if pattern in job_wide and component.sharing_pattern in job_wide:
            # Any number of ranks reads the one copy; its name does not depend on the topology.
            alone = Topology.single_node(1)
            return scope_of(ComponentSpec(key=component.key, pattern=pattern), alone, 0)
        if pattern is not component.sharing_pattern or world != self._manifest.world_size:
            return None
        # Not before: a short text can name a million ranks. Of ours, there are only so many.
        topology = self._manifest.topology.to_topology()
        spec = ComponentSpec(key=component.key, pattern=pattern, group_name=saved.group_name)
        scope = scope_of(spec, topology, rank)
        return scope if scope.readers == self._session.scope(component).readers else None

    def _open(self, component: StateComponent, scope: Scope | None) -> LoadPlan:
        """Plan to read a component from one copy, or from all of them together.

        Raises:
            MergeConflictError: the copies differ.
        """
        there = SavedComponent(
            self._session.repository, self._commit, self._manifest, self._shards, component.key
        )
        labels = there.labels if scope is None else [scope.label]
        documents = there.documents(labels)
        if scope is not None:
            documents = self._own_document(documents, component.key, scope)
        tree, path = there.document(documents)
        fit = other_kind(component, tree)
        if fit is not None:
            return LoadPlan(component=component, fit=fit, saved=SavedState(tree=tree, path=path))
        live = live_of(component)
        if scope is None and component.sharing_pattern in _PARTS:
            wants = wants_of(component, live)
            tree = tree if wants is None else prune_document(tree, wants)
        saved = there.open(labels, tree, path)
        unfit = misfits(live, saved.tensors)
        keys = leaf_keys(tree)
        found = {
            name: new_destination(component.stateful, tensor, keys.get(name, ()))
            for name, tensor in saved.tensors.items()
            if name not in live.specs
        }
        return LoadPlan(
            component=component,
            fit=compare(component, live, saved.tensors, tree, unfit),
            saved=saved,
            live=live,
            in_place=fillable(component, live, saved.tensors, unfit),
            kept=kept_as_live(component, live, saved.tensors, unfit),
            beside={name: one for name, one in found.items() if one is not None},
            unplaced=tuple(name for name, one in found.items() if one is None),
        )

    def _own_document(
        self, documents: Sequence[FileRecord], key: str, scope: Scope
    ) -> list[FileRecord]:
        """This rank's own document of a copy, where its members have their own; else the copy's."""
        files = {record.path: record for record in documents}
        own, shared = state_path(key, scope, self._session.world.rank), state_path(key, scope)
        name = own if own in files else shared
        if name not in files:
            raise ManifestError(path=f"{self._commit.path}/{name}", why="is not in the manifest")
        return [files[name]]


def _scope_of_rank(rank: int) -> Scope:
    return Scope(kind=ScopeKind.RANK, index=rank, writers=(rank,), readers=(rank,))
