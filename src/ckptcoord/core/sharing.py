"""What a trainer declares: its components, and who holds which copy of them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ckptcoord.core.lossy import EXACT, CompressionLevel, Lossy
from ckptcoord.errors import ConfigError, InvalidNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
_SHARD_NUMBER = re.compile(r"-[0-9]{5,}-of-[0-9]{5,}$")


class SharingPattern(StrEnum):
    """Who holds a copy of a component, hence who writes and who reads it (docs/protocol.md)."""

    GLOBAL = "global"
    PER_RANK = "per_rank"
    REPLICATED = "replicated"
    PER_GROUP = "per_group"
    PER_NODE = "per_node"


class ValidationLevel(StrEnum):
    """How closely replicas are compared before a save.

    NONE: not at all. QUICK: structure, shapes, dtypes and a sample of every tensor's bytes.
    TENSOR: a checksum of every tensor, computed where it lives. FULL: BLAKE3 of every byte.
    """

    NONE = "none"
    QUICK = "quick"
    TENSOR = "tensor"
    FULL = "full"


class OnWorldSizeChange(StrEnum):
    """What a load on another number of ranks does with state that differs between ranks.

    State that all who hold it have alike, or that is in pieces by name, loads on any number.
    REFUSE: names the component and what differs. SKIP: it keeps its live state, and the report says
    so. OWN: ranks that there were load their own; of what a new rank holds, `derive_state(step,
    rank)` is called where there is one, and it keeps its live state where there is none.
    """

    REFUSE = "refuse"
    SKIP = "skip"
    OWN = "own"


@runtime_checkable
class Stateful(Protocol):
    """Anything with torch's `state_dict`/`load_state_dict` pair."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Take it back."""
        ...


@dataclass(frozen=True, slots=True)
class StateComponent:
    """One declared piece of trainer state.

    Args:
        key: its name in the checkpoint: letters, digits, `_` and `-`, at most 64.
        stateful: anything with `state_dict`/`load_state_dict`, or a dict or list that the trainer
            holds and that a load fills in place.
        sharing_pattern: who holds a copy.
        process_group_name: for PER_GROUP, the group's name among the coordinator's process groups.
        required: when false, a checkpoint without it still loads.
        validate_replication: compare the copies at every save.
        validation_level: how closely.
        metadata: JSON values, kept in the manifest.
        get_state: returns the state instead of `stateful.state_dict()`.
        set_state: takes the loaded state instead of `stateful.load_state_dict()`.
        compression: `off`, `auto` or `aggressive`, in the place of the coordinator's level: `off`
            keeps it in plain safetensors in every checkpoint, deltas too.
        lossy: what may be given up of it, in the place of what the coordinator's settings say;
            `Lossy()` keeps it exact whatever they say.
        on_world_size_change: `refuse`, `skip` or `own`: what a load on another number of ranks
            does with state that differs between ranks.

    Raises:
        InvalidNameError: the key cannot be a file name.
        ConfigError: PER_GROUP without a group, or a group with another pattern; `lossy` that is
            none, or that `compression="off"` leaves without effect.
    """

    key: str
    stateful: Any
    sharing_pattern: SharingPattern
    process_group_name: str | None = None
    required: bool = True
    validate_replication: bool = False
    validation_level: ValidationLevel = ValidationLevel.TENSOR
    metadata: Mapping[str, Any] = field(default_factory=dict)
    get_state: Callable[[], Any] | None = None
    set_state: Callable[[Any], None] | None = None
    compression: CompressionLevel | None = None
    lossy: Lossy | None = None
    on_world_size_change: OnWorldSizeChange = OnWorldSizeChange.REFUSE

    def __post_init__(self) -> None:
        check_component_key(self.key)
        self._take("sharing_pattern", SharingPattern)
        self._take("validation_level", ValidationLevel)
        self._take("on_world_size_change", OnWorldSizeChange)
        if self.compression is not None:
            self._take("compression", CompressionLevel)
        self._check_lossy()
        if (self.sharing_pattern is SharingPattern.PER_GROUP) != (
            self.process_group_name is not None
        ):
            raise ConfigError(
                field=f"StateComponent({self.key!r}).process_group_name",
                why=f"is {self.process_group_name!r} with the pattern {self.sharing_pattern.name}",
                help="PER_GROUP needs the name of a process group, and only PER_GROUP takes one",
            )

    def _check_lossy(self) -> None:
        field = f"StateComponent({self.key!r}).lossy"
        if self.lossy is not None and not isinstance(self.lossy, Lossy):
            raise ConfigError(field=field, why=f"is a {type(self.lossy).__name__}, not Lossy(...)")
        if self.compression is CompressionLevel.OFF and self.lossy not in (None, EXACT):
            raise ConfigError(
                field=field, why='has no effect with compression="off", which writes no deltas'
            )

    def _take(self, name: str, kind: type[StrEnum]) -> None:
        """A member may be given by its value: `"replicated"`."""
        given = getattr(self, name)
        try:
            object.__setattr__(self, name, kind(given))
        except ValueError as error:
            raise ConfigError(
                field=f"StateComponent({self.key!r}).{name}",
                why=f"is {given!r}",
                help=f"Give one of {', '.join(str(member) for member in kind)}",
            ) from error

    @property
    def spec(self) -> ComponentSpec:
        """What placement needs to know of it."""
        return ComponentSpec(
            key=self.key, pattern=self.sharing_pattern, group_name=self.process_group_name
        )


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ComponentSpec:
    """A component without its state: all that placement depends on."""

    key: str
    pattern: SharingPattern
    group_name: str | None = None


def check_component_key(key: object) -> None:
    """Refuse a key that cannot stand in a file name.

    Raises:
        InvalidNameError: says why.
    """
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise InvalidNameError(
            kind="component key",
            name=str(key),
            why="is not 1 to 64 letters, digits, '_' or '-' that begin with no '-'",
        )
    if _SHARD_NUMBER.search(key) is not None:
        raise InvalidNameError(
            kind="component key", name=key, why="ends like the name of a shard (-00001-of-00002)"
        )
