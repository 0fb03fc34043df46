"""What is known of the tensors of a component: a parameter, a running mean, or nothing.

Something is given up only of what is known (`Compression.precision`), so nothing is guessed: a
buffer may hold variances, and a second moment that is a little off, or negative, ends a training.

*Parameters* are those of a `torch.nn.Module` that is the component, or whose bound `state_dict` is
its `get_state`, and require gradients: others may be statistics. In a tree without a module they
cannot be told from buffers.
*Moments* have the names that torch's optimizers give them, in the state of an optimizer: that of a
`torch.optim.Optimizer`, and whatever is built as one, wherever it stands in a tree:
`{"state": {...: {name: tensor}}, "param_groups": [...]}`, or as `OptimizerState` has it. Not those
of centered RMSprop, which takes the root of their difference.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from ckptcoord.core.box import parse_piece_name
from ckptcoord.core.jsonio import parse_json
from ckptcoord.core.lossy import Role
from ckptcoord.core.tree import MAX_STATE_BYTES
from ckptcoord.core.treecheck import ORDER, TAG
from ckptcoord.dist.messages import as_dict

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.dist.capture import CapturedComponent

# Running means of gradients, and of their squares, as torch's optimizers call them.
_IN_OPTIMIZERS = (
    dict.fromkeys(("exp_avg", "momentum_buffer"), Role.FIRST_MOMENT)
    | dict.fromkeys(
        ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum"),
        Role.SECOND_MOMENT,
    )
    | {"step": Role.COUNT}
)
# square_avg - grad_avg ** 2 is a variance: less than nothing, where either is a little off.
_MEAN, _SQUARES = "grad_avg", "square_avg"
# What torch puts around modules: their states' names are without it.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_LEAVES = ("tensor", "sharded", "ndarray")


class Roles:
    """The roles of one component's tensors, by their names or those of their pieces.

    Args:
        captured: the component.
        parameters: what `parameter_names` says of it.
    """

    def __init__(self, captured: CapturedComponent, parameters: Collection[str]) -> None:
        self._captured = captured
        self._parameters = parameters
        self._is_optimizer = isinstance(_owner_of(captured.component), torch.optim.Optimizer)

    def of(self, name: str) -> Role:
        """That of a tensor."""
        whole = _whole(name)
        if not self._is_optimizer:
            return self._known.get(whole, Role.OTHER)
        entry, _, key = whole.rpartition(".")
        return _role_in(key, centered=f"{entry}.{_MEAN}" in self._names)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(map(_whole, self._captured.tensors))

    @cached_property
    def _known(self) -> Mapping[str, Role]:
        path, text = self._captured.component.key, self._captured.document
        document = as_dict(parse_json(text, path=path, max_bytes=MAX_STATE_BYTES))
        return _roles_in(document["tree"], self._parameters)


def parameter_names(component: StateComponent) -> frozenset[str]:
    """The keys of what a module trains in its state, if the component is a module's."""
    owner = _owner_of(component)
    if not isinstance(owner, torch.nn.Module):
        return frozenset()
    found = owner.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in found if parameter.requires_grad}
    return frozenset(names | set(map(_unwrapped, names)))


def _owner_of(component: StateComponent) -> object:
    """Whose `state_dict` gives the component's state; None where another function does."""
    get_state = component.get_state
    if get_state is None:
        return component.stateful
    is_plain = getattr(get_state, "__name__", "") == "state_dict"
    return getattr(get_state, "__self__", None) if is_plain else None


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# The same tensors are saved again and again.
@lru_cache(maxsize=100_000)
def _whole(name: str) -> str:
    """The name of the tensor that a piece is one of."""
    piece = parse_piece_name(name)
    return name if piece is None else piece[0]


# --- the tree of a state document ----------------------------------------------------------------


def _roles_in(tree: JsonValue, parameters: Collection[str]) -> dict[str, Role]:
    found: dict[str, Role] = {}
    if parameters:
        for key, node in _members(tree).items():
            if key in parameters:
                found.update(_leaf(node, Role.PARAMETER))
    for mapping in _mappings(tree):
        if _is_optimizer_state(mapping):
            for members in map(_members, _values(mapping["state"])):
                for key, node in members.items():
                    found.update(_leaf(node, _role_in(key, centered=_MEAN in members)))
    return found


def _role_in(key: str, *, centered: bool) -> Role:
    """That of what stands under a key in an optimizer's state of one parameter."""
    if centered and key == _SQUARES:
        return Role.OTHER
    return _IN_OPTIMIZERS.get(key, Role.OTHER)


def _is_optimizer_state(mapping: Mapping[str, JsonValue]) -> bool:
    if "state" not in mapping:
        return False
    by_index = isinstance(mapping.get("param_groups"), list)
    return by_index or bool(_members(mapping.get("groups")) and _members(mapping.get("group_of")))


def _mappings(tree: JsonValue) -> Iterator[dict[str, JsonValue]]:
    """Every mapping with text keys, at any depth."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        members = _members(node)
        if members:
            yield members
        waiting += _values(node)


def _members(node: JsonValue) -> dict[str, JsonValue]:
    """What a mapping of any kind has under text keys."""
    if not isinstance(node, dict):
        return {}
    if TAG not in node:
        return {key: child for key, child in node.items() if key != ORDER}
    return {key: child for key, child in _pairs(node) if isinstance(key, str)}


def _values(node: JsonValue) -> list[JsonValue]:
    """What stands one level below."""
    if isinstance(node, list):
        return node
    if not isinstance(node, dict):
        return []
    if TAG not in node:
        return list(_members(node).values())
    items, fields = node.get("items"), node.get("fields")
    if isinstance(fields, dict):
        return list(fields.values())
    pairs = [child for _, child in _pairs(node)]
    return pairs or (items if isinstance(items, list) else [])


def _pairs(node: Mapping[str, JsonValue]) -> list[tuple[JsonValue, JsonValue]]:
    """Keys and values of a tagged mapping."""
    items = node.get("items")
    if node[TAG] not in _TAGGED_MAPPINGS or not isinstance(items, list):
        return []
    return [(one[0], one[1]) for one in items if isinstance(one, list)]


_TAGGED_MAPPINGS = ("dict", "OrderedDict", "StateDict", "defaultdict", "Counter")


def _leaf(node: JsonValue, role: Role) -> dict[str, Role]:
    """The role of a tensor by its name, if the node is one."""
    if isinstance(node, dict) and node.get(TAG) in _LEAVES:
        return {str(node["name"]): role}
    return {}
