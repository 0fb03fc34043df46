"""A state that is built as the last one was, taken apart in a fraction of the time.

An `Outline` is compiled from one state. Another one that matches it differs from that in constants
and in what the leaves hold, and in nothing else that its document depends on: this is the same text
but for the constants, and the leaves have the same names. An outline keeps keys and types, and of
leaves and constants nothing.
"""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from dataclasses import dataclass
from itertools import chain, compress
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptcoord.core.jsonio import JsonValue, dump_each
from ckptcoord.core.tree import flatten
from ckptcoord.core.treecodec import CONSTANTS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterator, Sequence

    from ckptcoord.core.leaf import LeafAdapter

_CONSTANTS = frozenset({type(None), bool, int, float, complex, str, bytes})  # none can be changed
# Of these, what is equal and of the same type is the same: not so 0.0 and -0.0, (1,) and (True,).
_KEYS = frozenset({type(None), bool, int, str, bytes})
_METADATA = "_metadata"  # an attribute that torch gives to the OrderedDicts of its modules


@dataclass(frozen=True, slots=True, kw_only=True)
class _Container:
    """What a container must hold; its own type is known to the one around it.

    Attributes:
        keys: of a dict, in order; None: it is a list or a tuple.
        key_types: theirs.
        types: of its children.
        children: what each of them is.
        alike: whether all of them are leaves, or all constants, and which; None: they are not.
        ordered: whether it may have attributes, and so must be looked at for them.
        metadata: a list of one, as it were: the one attribute that it has.
        dicts: where all of the children are plain dicts that hold no containers, what all of them
            hold, as one; None: they are not.
    """

    keys: list[object] | None
    key_types: list[type]
    types: list[type]
    children: tuple[_Child, ...]
    alike: bool | None
    ordered: bool
    metadata: _Container | None
    dicts: _Dicts | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dicts:
    """What dicts that stand one after the other must hold, so that one look serves for all.

    Attributes:
        sizes: theirs.
        keys: of all, in order.
        key_types: theirs.
        types: of the values.
        leaves: which of these are leaves; the others are constants.
        constants: which are constants.
    """

    sizes: list[int]
    keys: list[object]
    key_types: list[type]
    types: list[type]
    leaves: list[bool]
    constants: list[bool]


_Child: TypeAlias = "_Container | bool"
"""A container; True: a leaf; False: a constant."""


@dataclass(slots=True, kw_only=True)
class Match:
    """What a state has where an outline has places for it.

    Attributes:
        slots: its leaves, in the document's order: each as often as it stands in the state.
        constants: for `Outline.document`; nobody can change them.
    """

    slots: list[Any]
    constants: list[Any]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outline:
    """How a state is built.

    Attributes:
        names: of its leaves, in the document's order, each once.
        firsts: of each leaf, the slot where it stands first.
        ties: of each slot, the leaf that it is.
        root: the state, in a list of one.
        chunks: of the document, what is around the constants.
        places: of the constants between them, in the order in which `match` gives them.
    """

    names: tuple[str, ...]
    firsts: tuple[int, ...]
    ties: tuple[int, ...]
    root: _Container
    chunks: tuple[bytes, ...]
    places: tuple[int, ...]

    def match(self, state: object) -> Match | None:
        """The leaves and constants of a state; None where it is built in another way."""
        match = Match(slots=[], constants=[])
        return match if _walk([state], self.root, match) else None

    def is_tied(self, identities: Sequence[Hashable | None]) -> bool:
        """Whether slots of these identities are tied to one another as the outline's are.

        Args:
            identities: of all slots, as of `LeafAdapter.identity`.
        """
        return _ties(identities) == self.ties

    def document(self, constants: Sequence[object]) -> bytes:
        """The text of the state that had these constants. Thread safe."""
        texts = dump_each([CONSTANTS[type(one)](one) for one in constants])
        parts = [b""] * (2 * len(self.chunks) - 1)
        parts[::2] = self.chunks
        parts[1::2] = [texts[place] for place in self.places]
        return b"".join(parts)


def compile_outline(
    state: object,
    text: bytes,
    adapter: LeafAdapter,
    leaf_types: Collection[type],
    dump: Callable[[JsonValue], bytes],
) -> Outline | None:
    """The outline of a state that `flatten` takes.

    Args:
        state: of dicts, OrderedDicts, lists and tuples, of constants that nobody can change and of
            leaves that have an identity; if anything else is in it, it has no outline.
        text: what `dump` makes of it.
        adapter: as for `flatten`.
        leaf_types: exact types of leaves, of which the document has no more than the name.
        dump: makes a text of the tree's document, in which `dump_json` writes all values.
    """
    child = _compiled(state, frozenset(leaf_types))
    if child is None:
        return None
    root = _listed([state], [child])
    match = Match(slots=[], constants=[])
    assert _walk([state], root, match), "a state is built as it is built"
    ties = _ties([adapter.identity(slot) for slot in match.slots])
    if ties is None:
        return None
    mark = _free_mark(text)
    marks = (f"{mark}{number}>" for number in range(len(match.constants)))
    tree = flatten(_marked(state, child, marks), adapter)
    # The text between marks, and the numbers of these, in turn.
    parts = re.split(f'"{mark}([0-9]+)>"'.encode(), dump(tree.document))
    return Outline(
        names=tuple(leaf.name for leaf in tree.leaves),
        firsts=_firsts(ties),
        ties=ties,
        root=root,
        chunks=tuple(parts[::2]),
        places=tuple(map(int, parts[1::2])),
    )


def _ties(identities: Sequence[Hashable | None]) -> tuple[int, ...] | None:
    """Which leaf each slot is, as they come; None where one has no identity."""
    leaves: dict[Hashable, int] = {}
    ties = tuple([leaves.setdefault(identity, len(leaves)) for identity in identities])
    return None if None in leaves else ties


def _firsts(ties: Sequence[int]) -> tuple[int, ...]:
    """Of each leaf, the slot where it stands first; leaves are numbered as they come."""
    slots: dict[int, int] = {}
    for slot, leaf in enumerate(ties):
        slots.setdefault(leaf, slot)
    return tuple(slots.values())


# --- a state against an outline -------------------------------------------------------------------


def _walk(value: Any, node: _Container, match: Match) -> bool:  # noqa: ANN401 (its type is known)
    """Collect what a container holds; returns whether it is all that it must be."""
    items = value if node.keys is None else _values(value, node)
    if items is None or list(map(type, items)) != node.types:
        return False
    found = _walk_items(items, node, match)
    return found and (not node.ordered or _walk_attributes(vars(value), node.metadata, match))


def _walk_items(items: Sequence[Any], node: _Container, match: Match) -> bool:
    if node.alike is not None:
        (match.slots if node.alike else match.constants).extend(items)
        return True
    if node.dicts is not None:
        return _walk_dicts(items, node.dicts, match)
    for item, child in zip(items, node.children, strict=True):
        if child is True:
            match.slots.append(item)
        elif child is False:
            match.constants.append(item)
        elif not _walk(item, child, match):
            return False
    return True


def _walk_dicts(dicts: Sequence[dict[object, object]], expected: _Dicts, match: Match) -> bool:
    """As `_walk` of each of them, one thing at a time of all: loops in C. Their type is known."""
    keys = list(chain.from_iterable(dicts))
    # Types first, as in `_values`.
    if (
        list(map(len, dicts)) != expected.sizes
        or list(map(type, keys)) != expected.key_types
        or keys != expected.keys
    ):
        return False
    values = list(chain.from_iterable(map(dict.values, dicts)))
    if list(map(type, values)) != expected.types:
        return False
    match.slots.extend(compress(values, expected.leaves))
    match.constants.extend(compress(values, expected.constants))
    return True


def _values(value: dict[object, object], node: _Container) -> list[object] | None:
    """What stands under the keys; None where these are others, or in another order."""
    # Types first: what compares the keys from there on is no code of the trainer's.
    if list(map(type, value)) != node.key_types or list(value) != node.keys:
        return None
    return list(value.values())


def _walk_attributes(
    attributes: dict[str, object], metadata: _Container | None, match: Match
) -> bool:
    if metadata is None:
        return not attributes
    return list(attributes) == [_METADATA] and _walk([attributes[_METADATA]], metadata, match)


# --- an outline of a state ------------------------------------------------------------------------


def _compiled(value: Any, leaf_types: frozenset[type]) -> _Child | None:  # noqa: ANN401
    """What a value is; None: nothing that an outline can be made of."""
    kind = type(value)
    if kind in leaf_types:
        return True
    if kind in _CONSTANTS:
        return False
    if kind in (list, tuple):
        children = _all_compiled(value, leaf_types)
        return None if children is None else _listed(value, children)
    if kind not in (dict, OrderedDict) or not _KEYS.issuperset(map(type, value)):
        return None
    children = _all_compiled(value.values(), leaf_types)
    attributes = vars(value) if kind is OrderedDict else {}
    around = _all_compiled(attributes.values(), leaf_types)
    if children is None or around is None or not {_METADATA}.issuperset(attributes):
        return None
    return _Container(
        keys=list(value),
        key_types=list(map(type, value)),
        types=list(map(type, value.values())),
        children=tuple(children),
        alike=_alike(children),
        ordered=kind is OrderedDict,
        metadata=_listed(list(attributes.values()), around) if attributes else None,
        dicts=_as_dicts(children),
    )


def _all_compiled(values: Any, leaf_types: frozenset[type]) -> list[_Child] | None:  # noqa: ANN401
    children = [_compiled(value, leaf_types) for value in values]
    found = [child for child in children if child is not None]
    return found if len(found) == len(children) else None


def _listed(values: Sequence[object], children: list[_Child]) -> _Container:
    return _Container(
        keys=None,
        key_types=[],
        types=list(map(type, values)),
        children=tuple(children),
        alike=_alike(children),
        ordered=False,
        metadata=None,
        dicts=_as_dicts(children),
    )


def _as_dicts(children: list[_Child]) -> _Dicts | None:
    """Plain dicts of leaves and constants alone, as one."""
    dicts = [child for child in children if not isinstance(child, bool) and child.keys is not None]
    held = [kind for one in dicts for kind in one.children if isinstance(kind, bool)]
    types = [kind for one in dicts for kind in one.types]
    if len(dicts) < len(children) or len(held) < len(types) or any(one.ordered for one in dicts):
        return None
    return _Dicts(
        sizes=[len(one.types) for one in dicts],
        keys=[key for one in dicts for key in one.keys or ()],
        key_types=[kind for one in dicts for kind in one.key_types],
        types=types,
        leaves=held,
        constants=[not kind for kind in held],
    )


def _alike(children: list[_Child]) -> bool | None:
    for kind in (True, False):
        if all(child is kind for child in children):
            return kind
    return None


def _free_mark(text: bytes) -> str:
    """Something that is nowhere in a text, and stands for itself in JSON and in a pattern."""
    return next(mark for mark in (f"<{n}:" for n in itertools.count()) if mark.encode() not in text)


def _marked(value: Any, child: _Child, marks: Iterator[str]) -> object:  # noqa: ANN401
    """A copy with marks for constants, in the order in which `_walk` collects these."""
    if child is True:
        return value
    if child is False:
        return next(marks)
    if child.keys is None:
        return type(value)(
            [_marked(*pair, marks) for pair in zip(value, child.children, strict=True)]
        )
    pairs = zip(value.values(), child.children, strict=True)
    copy = type(value)(zip(child.keys, [_marked(*pair, marks) for pair in pairs], strict=True))
    if child.metadata is not None:
        copy._metadata = _marked(value._metadata, child.metadata.children[0], marks)  # noqa: SLF001
    return copy
