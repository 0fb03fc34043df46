"""Does what was saved fit what is live; and if so, put it there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.autograd.graph import increment_version

from ckptcoord.core.box import Box
from ckptcoord.core.leaf import LeafKind
from ckptcoord.core.sharing import StateComponent, Stateful
from ckptcoord.core.tree import flatten, unflatten
from ckptcoord.core.treemerge import top_keys
from ckptcoord.dist.capture import (
    TORCH_DTYPES,
    TorchAdapter,
    layout_or_refuse,
    live_state,
    spec_of,
)
from ckptcoord.dist.sharded import Sharded, is_dtensor
from ckptcoord.errors import CkptError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.treemerge import Keys
    from ckptcoord.dist.saved import SavedTensor
    from ckptcoord.dist.sharded import Layout
    from ckptcoord.repo.shards import TensorSpec

_DICT_TAGS = frozenset({"dict", "OrderedDict", "StateDict", "Counter", "defaultdict"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a saved component compares with the live one; names are `component.tensor`.

    `other_kind` says why nothing of it can be loaded, where what was saved is another kind of
    thing altogether.
    """

    other_kind: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def perfect(self) -> bool:
        """Nothing stands in the way of a strict load."""
        return not (self.missing or self.unexpected or self.mismatched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """A component as it is live.

    Attributes:
        document: its state document.
        specs: of its tensors and arrays as wholes, by name.
        values: the tensors themselves.
        layouts: how this rank holds them.
    """

    document: JsonValue = None
    specs: Mapping[str, TensorSpec] = field(default_factory=dict)
    values: Mapping[str, object] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)


def live_of(component: StateComponent) -> Live:
    """The live state of a component, taken apart.

    Raises:
        UnsupportedStateError: it could not be saved either.
        CkptError: its own code raised.
    """
    adapter = TorchAdapter()
    tree = flatten(live_state(component), adapter, root=component.key)
    specs, values, layouts = {}, {}, {}
    for leaf in tree.leaves:
        if isinstance(leaf.value, np.ndarray):
            specs[leaf.name] = spec_of(component.key, leaf.name, leaf.value)
            continue
        layout = layout_or_refuse(f"{component.key}.{leaf.name}", leaf.value)
        part = next((tensor for _, tensor in layout.pieces), None)
        whole = torch.empty(0, dtype=layout.dtype) if part is None else part
        spec = spec_of(component.key, leaf.name, whole)
        specs[leaf.name] = replace(spec, shape=layout.shape)
        values[leaf.name], layouts[leaf.name] = leaf.value, layout
    return Live(document=tree.document, specs=specs, values=values, layouts=layouts)


def other_kind(component: StateComponent, saved_tree: JsonValue) -> Fit | None:
    """Why nothing of a component can be loaded; None where it may be."""
    why = _other_kind(component, saved_tree)
    return Fit(other_kind=why, mismatched=(f"{component.key}: {why}",)) if why else None


def misfits(live: Live, saved: Mapping[str, SavedTensor]) -> dict[str, str]:
    """Why live tensors cannot take what was saved by their names, by name."""
    found = {name: _misfit(live, name, saved[name]) for name in live.specs if name in saved}
    return {name: why for name, why in found.items() if why}


def _misfit(live: Live, name: str, there: SavedTensor) -> str:
    spec, layout = live.specs[name], live.layouts.get(name)
    # Where there are no pieces, nothing says of which dtype they would be.
    if spec.shape != there.spec.shape or (there.pieces and spec.dtype != there.spec.dtype):
        return f"saved {_text(there.spec)}, live {_text(spec)}"
    for box, _ in () if layout is None else layout.pieces:
        if not there.has(box):
            return f"no saved pieces cover {list(box.size)} at {list(box.offset)}"
    return ""


def compare(
    component: StateComponent,
    live: Live,
    saved: Mapping[str, SavedTensor],
    saved_tree: JsonValue,
    unfit: Mapping[str, str],
) -> Fit:
    """Compare names, and with what `misfits` says, with the live state.

    Only a module knows all its names before a load; an optimizer makes its state as it steps, so
    what it lacks is no surprise.
    """
    key, exact = component.key, _is_module(component)
    return Fit(
        missing=tuple(f"{key}.{name}" for name in live.specs if name not in saved),
        unexpected=tuple(f"{key}.{name}" for name in saved if name not in live.specs)
        if exact
        else (),
        mismatched=(
            *(f"{key}.{name}: {why}" for name, why in unfit.items()),
            *_group_mismatch(component, live.document, saved_tree),
        ),
    )


def kept_as_live(
    component: StateComponent,
    live: Live,
    saved: Mapping[str, SavedTensor],
    unfit: Iterable[str],
) -> frozenset[str]:
    """Of those that do not fit, what a load that goes on all the same leaves as it is.

    What is here as a whole is replaced by another whole tensor, except in a module; of nothing else
    is it known which part of the saved one belongs here.
    """
    return frozenset(
        name
        for name in unfit
        if name in live.layouts
        and (
            _is_module(component)
            or live.layouts[name].sharded
            or is_dtensor(live.values[name])
            or not saved[name].has(Box.whole(saved[name].spec.shape))
        )
    )


def fillable(
    component: StateComponent,
    live: Live,
    saved: Mapping[str, SavedTensor],
    unfit: Collection[str],
) -> dict[str, Layout]:
    """The live tensors that the saved bytes may go straight into, by name.

    For them a load needs no memory of its own and no copy. Those of a module and of a plain dict or
    list: others may keep or change what they are given before they take it, unless they say that
    they `fills_in_place`.
    """
    stateful = component.stateful
    plain = isinstance(stateful, dict | list) and not isinstance(stateful, Stateful)
    if component.get_state or component.set_state:
        return {}
    willing = isinstance(stateful, torch.nn.Module) or getattr(stateful, "fills_in_place", False)
    if not plain and not willing:
        return {}
    return {
        name: layout
        for name, layout in live.layouts.items()
        if name in saved
        and name not in unfit
        and saved[name].kind is LeafKind.TENSOR  # an array's stored form need not be its memory
        and layout.pieces
        and all(in_plain_memory(tensor) for _, tensor in layout.pieces)
    }


def unshared(components: Iterable[Mapping[str, Layout]]) -> list[dict[str, Layout]]:
    """The same without tensors whose memory another one has a part in: the last one would win."""
    groups = list(components)
    # Pieces of one tensor lie beside one another, maybe in one storage.
    owners = Counter(
        place for group in groups for one in group.values() for place in _storages(one)
    )
    return [
        {
            name: one
            for name, one in group.items()
            if all(owners[place] == 1 for place in _storages(one))
        }
        for group in groups
    ]


def wants_of(component: StateComponent, live: Live) -> Callable[[Keys], bool] | None:
    """Which members of a merged document this rank has a use for; None: all."""
    stateful = component.stateful
    wants = getattr(stateful, "wants_state", None)
    if callable(wants):
        return lambda keys: bool(wants(keys))
    if _is_module(component):
        names = top_keys(live.document)
        return lambda keys: len(keys) != 1 or keys[0] in names
    return None


def empty_like(
    spec: TensorSpec, *, size: tuple[int, ...] | None = None, file: str = ""
) -> torch.Tensor:
    """A new CPU tensor; of this size instead of the spec's. Errors name the `file` it is for.

    Raises:
        ConfigError: this torch has no such dtype.
        CkptError: there is no memory for it.
    """
    dtype = TORCH_DTYPES.get(spec.dtype)
    if dtype is None:
        raise ConfigError(
            field=f"tensor {spec.name!r}",
            why=f"has the dtype {spec.dtype}, which this torch ({torch.__version__}) lacks",
        )
    try:
        return torch.empty(spec.shape if size is None else size, dtype=dtype)
    except RuntimeError as error:  # what torch raises in the place of a MemoryError
        of = f" of {file}" if file else ""
        why = f"tensor {spec.name!r}{of} needs {spec.nbytes:,} bytes of memory, more than there are"
        raise CkptError(what=why) from error


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data


def count_change(tensors: Iterable[torch.Tensor]) -> None:
    """Tell autograd that tensors were written to, as it cannot know by itself."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)


def build(tree: JsonValue, tensors: Mapping[str, object], path: str) -> object:
    """The saved state as Python objects."""
    return unflatten(tree, tensors, TorchAdapter(), path=path)


def check_state(component: StateComponent, state: object) -> None:
    """Let the component refuse what it could not take, while nothing has changed (INV-8).

    Tensors in it that will be filled in place hold what is live.

    Raises:
        CkptError: why it is refused; or its own code raised; chained.
    """
    check = getattr(component.stateful, "check_state", None)
    if component.set_state is not None or not callable(check):
        return
    try:
        check(state)
    except CkptError:
        raise
    except Exception as error:
        raise CkptError(
            what=f"component {component.key!r}: checking its state failed: "
            f"{type(error).__name__}: {error}",
            component=component.key,
        ) from error


def apply(component: StateComponent, state: object, *, fit: Fit) -> None:
    """Put a loaded state into the live component. Called only once every rank is ready (INV-8).

    Raises:
        CkptError: the component's own code raised; chained.
    """
    try:
        if component.set_state is not None:
            component.set_state(state)
        elif isinstance(component.stateful, torch.nn.Module):
            _load_module(component, state, fit)
        elif isinstance(component.stateful, Stateful):
            component.stateful.load_state_dict(state)  # type: ignore[arg-type]
        else:
            _fill(component.stateful, state)
    except Exception as error:
        raise CkptError(
            what=f"component {component.key!r}: loading its state failed: "
            f"{type(error).__name__}: {error}",
            help="Components before it in the list have been loaded already",
            component=component.key,
        ) from error


def derive(component: StateComponent, step: int, rank: int) -> None:
    """Let what a new rank holds make a state of its own; called last, as nothing was loaded.

    Raises:
        CkptError: its own code raised; chained.
    """
    make = getattr(component.stateful, "derive_state", None)
    if not callable(make):
        return
    try:
        make(step, rank)
    except Exception as error:
        raise CkptError(
            what=f"component {component.key!r}: deriving the state of a new rank failed: "
            f"{type(error).__name__}: {error}",
            help="All other components have been loaded already",
            component=component.key,
        ) from error


def _load_module(component: StateComponent, state: object, fit: Fit) -> None:
    prefix = f"{component.key}."
    skipped = {text.removeprefix(prefix).partition(": ")[0] for text in fit.mismatched}
    assert isinstance(state, dict), "a module's state is a dict"
    kept = {name: value for name, value in state.items() if name not in skipped}
    component.stateful.load_state_dict(kept, strict=fit.perfect)


def _fill(live: object, state: object) -> None:
    """Make a dict or list equal to `state`; its tensors stay the same objects."""
    if isinstance(live, dict) and isinstance(state, dict):
        merged = {key: _merged(live.get(key), value) for key, value in state.items()}
        live.clear()
        live.update(merged)
    elif isinstance(live, list) and isinstance(state, list):
        live[:] = [
            _merged(live[i] if i < len(live) else None, value) for i, value in enumerate(state)
        ]
    else:
        raise TypeError(f"a {type(live).__name__} cannot be filled from a {type(state).__name__}")


def _merged(live: object, value: object) -> object:
    if live is value:
        return live
    if isinstance(live, Sharded) and isinstance(value, Sharded):
        _merged(live.tensor, value.tensor)
        return live
    if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
        if live.shape == value.shape and live.dtype == value.dtype and not _overlaps(live):
            with torch.no_grad():
                return live.copy_(value)
    elif type(live) is type(value) and isinstance(live, dict | list):
        _fill(live, value)
        return live
    return value


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share memory, as in an expanded tensor: then it cannot be written to."""
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _other_kind(component: StateComponent, saved: JsonValue) -> str:
    """Why a saved state cannot go into the live thing at all; empty when it may.

    Raises:
        ConfigError: no state can: nothing takes it.
    """
    live = component.stateful
    module = isinstance(live, torch.nn.Module)
    if component.set_state is not None or (isinstance(live, Stateful) and not module):
        return ""  # what it takes is its own affair
    if not module and not isinstance(live, dict | list):
        raise ConfigError(
            field=f"StateComponent({component.key!r}).set_state",
            why=f"is missing, and a {type(live).__name__} cannot be filled",
            help="Give it beside get_state",
        )
    wanted = "list" if isinstance(live, list) else "dict"
    found = _kind_of(saved)
    return "" if found == wanted else f"saved as a {found}, live it is a {wanted}"


def _kind_of(node: JsonValue) -> str:
    if not isinstance(node, dict):
        return type(node).__name__
    tag = str(node.get("$", "dict"))
    return "dict" if tag in _DICT_TAGS else tag


def in_plain_memory(tensor: torch.Tensor) -> bool:
    """Whether its bytes in memory are its elements in row-major order."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def _storages(layout: Layout) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for _, tensor in layout.pieces}


def _is_module(component: StateComponent) -> bool:
    return isinstance(component.stateful, torch.nn.Module) and component.get_state is None


def _group_mismatch(
    component: StateComponent, live: JsonValue, saved: JsonValue
) -> tuple[str, ...]:
    """An optimizer over other parameters: torch would find out only halfway through the load."""
    if not isinstance(component.stateful, torch.optim.Optimizer):
        return ()
    sizes = [_group_sizes(document) for document in (saved, live)]
    if sizes[0] == sizes[1]:
        return ()
    return (f"{component.key}.param_groups: saved {sizes[0]} parameters a group, live {sizes[1]}",)


def _group_sizes(document: JsonValue) -> list[int]:
    groups = document.get("param_groups") if isinstance(document, dict) else None
    sizes = []
    for group in groups if isinstance(groups, list) else []:
        params = group.get("params") if isinstance(group, dict) else None
        sizes.append(len(params) if isinstance(params, list) else 0)
    return sizes


def _text(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"
