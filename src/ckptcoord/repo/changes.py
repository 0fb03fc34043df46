"""What differs between two checkpoints: values, for Python, the CLI and notebooks alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from ckptcoord.core.statediff import ScalarChange, Status, Value

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptcoord.codec.compare import Difference
    from ckptcoord.codec.tensorspec import TensorSpec
    from ckptcoord.core.jsonio import JsonValue

__all__ = [
    "CheckpointDiff",
    "LayerChange",
    "MetricChange",
    "ScalarChange",
    "Status",
    "TensorChange",
    "layer_of",
]

_ALIKE = frozenset({Status.EQUAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """What became of one tensor.

    Attributes:
        name: with its component: `model.h.0.weight`; of copies that differ from one another also
            with the copy's label: `rng.rank00002.cuda`.
        status: EQUAL where every bit is.
        old: dtype and shape; None where it was not there, or no piece of it was.
        new: the same.
        difference: how far they are apart; None where that was not computed: of what is equal by
            digest, and of what cannot be compared element by element.
        values: of a tensor without dimensions that changed: the old and the new one.
    """

    name: str
    status: Status
    old: TensorSpec | None = None
    new: TensorSpec | None = None
    difference: Difference | None = None
    values: tuple[Value, Value] | None = None

    @property
    def component(self) -> str:
        """The key of its component."""
        return self.name.partition(".")[0]

    @property
    def relative_l2(self) -> float:
        """As `Difference` has it; 0 where nothing changed, infinite where that is not to be said.

        So what cannot be compared is sorted before what can.
        """
        if self.difference is not None:
            return self.difference.relative_l2
        return 0.0 if self.status is Status.EQUAL else math.inf

    def to_json(self) -> dict[str, JsonValue]:
        """The fields; numbers that are not finite are null."""
        document: dict[str, JsonValue] = {
            "name": self.name,
            "status": self.status.value,
            "old": _form_json(self.old),
            "new": _form_json(self.new),
        }
        if self.difference is not None:
            document |= _difference_json(self.difference)
        if self.values is not None:
            document["values"] = [_value_json(value) for value in self.values]
        return document


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChange:
    """The tensors of a layer together.

    Attributes:
        name: what their names begin with.
        tensors: how many there are, old and new ones together.
        statuses: how many of each.
        relative_l2: of those that were compared, as if they were one tensor; 0 where none changed,
            infinite where they were zeros, or where what is not equal cannot be compared.
        max_abs: the largest difference; 0 where none was compared.
        nans: how many there are in what was compared, old and new.
        infinities: the same of infinities.
    """

    name: str
    tensors: int
    statuses: dict[Status, int]
    relative_l2: float
    max_abs: float
    nans: tuple[int, int]
    infinities: tuple[int, int]

    @property
    def changed(self) -> int:
        """How many are not what they were."""
        return self.tensors - self.statuses.get(Status.EQUAL, 0)

    def to_json(self) -> dict[str, JsonValue]:
        """The fields; numbers that are not finite are null."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            **{status.value: count for status, count in sorted(self.statuses.items())},
            "relative_l2": _finite(self.relative_l2),
            "max_abs": _finite(self.max_abs),
            "nans": [*self.nans],
            "infinities": [*self.infinities],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricChange:
    """A metric of two checkpoints; None where one of them has none of that name."""

    name: str
    old: float | None
    new: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class CheckpointDiff:
    """What differs between two checkpoints.

    Attributes:
        old: the ref of the first.
        new: the ref of the second.
        tensors: every tensor of either, sorted by name.
        documents: values of their state that are no tensors, in the order of the documents.
        metrics: those that differ, by name. They are about the state, not of it.
        read_bytes: of tensors, on both sides, that were compared; what is equal by digest is not.
    """

    old: str
    new: str
    tensors: tuple[TensorChange, ...]
    documents: tuple[ScalarChange, ...]
    metrics: tuple[MetricChange, ...]
    read_bytes: int = 0

    @property
    def differs(self) -> bool:
        """Whether anything of the state does: a tensor or a value, not a metric."""
        return bool(self.documents) or any(one.status not in _ALIKE for one in self.tensors)

    @cached_property
    def counts(self) -> dict[Status, int]:
        """How many tensors there are of each status; all are in it."""
        found = dict.fromkeys(Status, 0)
        for one in self.tensors:
            found[one.status] += 1
        return found

    @cached_property
    def changed(self) -> tuple[TensorChange, ...]:
        """The tensors that are not what they were, those first that changed most."""
        return tuple(
            sorted(
                (one for one in self.tensors if one.status is not Status.EQUAL),
                key=lambda one: (-one.relative_l2, one.name),
            )
        )

    @cached_property
    def scalars(self) -> tuple[ScalarChange, ...]:
        """Values that differ: of documents, then those that are tensors without dimensions."""
        return (
            *self.documents,
            *(
                ScalarChange(path=one.name, status=one.status, old=one.values[0], new=one.values[1])
                for one in self.tensors
                if one.values is not None
            ),
        )

    @cached_property
    def layers(self) -> tuple[LayerChange, ...]:
        """Tensors by layer (`layer_of`) but for scalars; those first that changed most."""
        groups: dict[str, list[TensorChange]] = {}
        for one in self.tensors:
            if one.values is None:
                groups.setdefault(layer_of(one.name), []).append(one)
        found = [_layer(name, members) for name, members in groups.items()]
        return tuple(sorted(found, key=lambda one: (-one.relative_l2, -one.changed, one.name)))

    def to_json(self, *, top: int | None = None) -> dict[str, JsonValue]:
        """All but the tensors that are equal; at most `top` of what there are many of."""
        return {
            "old": self.old,
            "new": self.new,
            "differs": self.differs,
            "counts": {status.value: count for status, count in self.counts.items()},
            "read_bytes": self.read_bytes,
            "metrics": [
                {"name": one.name, "old": one.old, "new": one.new} for one in self.metrics[:top]
            ],
            "scalars": [_scalar_json(one) for one in self.scalars[:top]],
            "layers": [one.to_json() for one in self.layers[:top] if one.changed],
            "tensors": [one.to_json() for one in self.changed[:top]],
        }

    def __repr__(self) -> str:
        tensors = ", ".join(
            f"{count:,} {status.value}" for status, count in self.counts.items() if count
        )
        values = f"; {len(self.scalars):,} changed values" if self.scalars else ""
        return f"<CheckpointDiff {self.old} -> {self.new}: {tensors or 'no'} tensors{values}>"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from ckptcoord.repo.html import diff_html  # late: only notebooks need it

        return diff_html(self)


def layer_of(name: str) -> str:
    """The layer of a tensor: its name through the first number, else without its last part.

    `model.layers.3` of `model.layers.3.attn.weight`, `model.embed` of `model.embed.weight`.
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isascii() and part.isdigit():
            return ".".join(parts[: at + 1])
    return ".".join(parts[:-1]) or name


def metric_changes(old: dict[str, float], new: dict[str, float]) -> tuple[MetricChange, ...]:
    """The metrics that differ, by name."""
    names = sorted(old.keys() | new.keys())
    every = (MetricChange(name=name, old=old.get(name), new=new.get(name)) for name in names)
    return tuple(one for one in every if one.old != one.new)


def _layer(name: str, members: Sequence[TensorChange]) -> LayerChange:
    statuses: dict[Status, int] = {}
    for one in members:
        statuses[one.status] = statuses.get(one.status, 0) + 1
    found = [one.difference for one in members if one.difference is not None]
    change = math.hypot(*(one.l2 for one in found))
    size = math.hypot(*(one.l2_old for one in found))
    unlike = not found and statuses.keys() - _ALIKE
    return LayerChange(
        name=name,
        tensors=len(members),
        statuses=statuses,
        relative_l2=change / size if size else math.inf if change or unlike else 0.0,
        max_abs=max((one.max_abs for one in found), default=0.0),
        nans=_pairwise_sum(one.nans for one in found),
        infinities=_pairwise_sum(one.infinities for one in found),
    )


def _pairwise_sum(pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    flat = list(chain.from_iterable(pairs))
    return sum(flat[::2]), sum(flat[1::2])


def _difference_json(one: Difference) -> dict[str, JsonValue]:
    return {
        "elements": one.elements,
        "differing": one.differing,
        "relative_l2": _finite(one.relative_l2),
        "l2": _finite(one.l2),
        "l2_old": _finite(one.l2_old),
        "l2_new": _finite(one.l2_new),
        "max_abs": _finite(one.max_abs),
        "cosine": one.cosine,
        "nans": [*one.nans],
        "infinities": [*one.infinities],
    }


def _form_json(spec: TensorSpec | None) -> JsonValue:
    return None if spec is None else {"dtype": spec.dtype, "shape": [*spec.shape]}


def _scalar_json(one: ScalarChange) -> JsonValue:
    return {
        "path": one.path,
        "status": one.status.value,
        "old": _value_json(one.old),
        "new": _value_json(one.new),
    }


def _value_json(value: Value) -> JsonValue:
    """JSON has no NaN and no infinity: their names."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
