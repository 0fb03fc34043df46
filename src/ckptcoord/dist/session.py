"""What every operation of one coordinator shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ckptcoord.dist.capturer import Capturer
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.outcomes import is_failure
from ckptcoord.dist.roles import parameter_names
from ckptcoord.errors import CkptError, ThreadLimitError
from ckptcoord.plan.lineage import Precision
from ckptcoord.plan.placement import scope_of
from ckptcoord.repo.bases import Bases
from ckptcoord.repo.threads import is_refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.core.topology import Scope, Topology
    from ckptcoord.dist.choice import Choice
    from ckptcoord.dist.config import CoordinatorConfig
    from ckptcoord.dist.holdings import Inventory, Planned
    from ckptcoord.dist.world import World
    from ckptcoord.repo.manifests import Declared
    from ckptcoord.repo.repository import Repository

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class Session:
    """One coordinator on one rank.

    Attributes:
        writer: this rank's nonce; rank 0's is the writer that claims and commits.
        claimed: the epoch that rank 0 holds the branch with, once it has claimed it.
        declared: on rank 0, what all ranks together declared at the last save.
        chosen: on rank 0, what it decided for the save that runs: anchor, or delta and of what.
        inventories: what the members of PER_GROUP instances hold, by component and version.
        planned: the files of each component's copy in the last save.
        versions: of PER_GROUP components, as the last save found them: this rank's structure, and
            the version of the instance's inventories; None where all its members hold the same.
        capturer: asks the components for their state.
        own: what this rank would write, and what that was worked out from.
        heads: on rank 0, the folders of other branches' heads at the first delta of this session.
        bases: what is stored already.
        parameters: where precision is bounded, the names of modules' parameters, by component. They
            are asked for once: while a module runs, its wrapper may take them out of it.
        channel: the process group that bytes are sent over; None until a load needs one.
        refused: why the next save must not use it; empty when it may.
    """

    world: World
    topology: Topology
    repository: Repository
    components: tuple[StateComponent, ...]
    config: CoordinatorConfig
    writer: str
    claimed: int | None = None
    inventories: dict[tuple[str, str], Inventory] = field(default_factory=dict)
    planned: dict[str, Planned] = field(default_factory=dict)
    versions: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    capturer: Capturer = field(default_factory=Capturer)
    own: tuple[object, Mapping[str, frozenset[str]]] | None = None
    declared: tuple[Declared, ...] = ()
    chosen: Choice | None = None
    heads: tuple[str, ...] | None = None
    refused: str = ""
    channel: object = None
    bases: Bases = field(init=False)
    parameters: Mapping[str, frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.bases = Bases(self.repository)
        near = self.config.rule.precision is Precision.BOUNDED
        asked = self.components if near else ()
        self.parameters = {one.key: parameter_names(one) for one in asked}

    def deadline(self) -> Deadline:
        """For a wait that begins now."""
        return Deadline.after(self.config.timeout_s)

    def step(self, name: str) -> None:
        """This rank has reached a step of the protocol."""
        self.config.probe(name)

    def scope(self, component: StateComponent) -> Scope:
        """The copy of the component that this rank takes part in."""
        return scope_of(component.spec, self.topology, self.world.rank)

    def scopes(self) -> Mapping[str, Scope]:
        """By component key."""
        return {component.key: self.scope(component) for component in self.components}


def heard(work: Callable[[], _T]) -> _T | CkptError:
    """The result of local work, or its failure as a value that the other ranks can hear.

    Whatever fails: a rank that kept an error to itself would have the others wait for it. An
    interrupt is raised.
    """
    try:
        return work()
    except CkptError as error:
        return error
    except BaseException as error:
        if not is_failure(error):
            raise
        named = _named(error)  # raised, chained, once all have heard of it
        named.__cause__ = error
        return named


def _named(error: BaseException) -> CkptError:
    """What is not ckptcoord's own, in its words."""
    if isinstance(error, MemoryError):
        help_ = "Lower queue_depth or set staging_bytes if saves in the background take it"
        return CkptError(what=f"out of memory: {error}", help=help_)
    if is_refusal(error):
        return ThreadLimitError()
    return CkptError(what=f"{type(error).__name__}: {error}")


def close_after(error: BaseException | None, close: Callable[[], None], *, what: str) -> None:
    """Leave a block: close what it worked with. Of two errors, the one that ends it comes first.

    Args:
        error: that ends the block; None: it came to its end.
        close: finishes what is under way.
        what: failed, where that does.

    Raises:
        CkptError: as `close`, where the block came to its end.
    """
    try:
        close()
    except CkptError as failure:
        if error is None:
            raise
        if failure is not error:
            error.add_note(f"{what} failed, too: {failure}")
