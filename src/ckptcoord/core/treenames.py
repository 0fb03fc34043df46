"""Where a value stands in a state: for people who read an error, and as the name of a leaf."""

from __future__ import annotations

import hashlib
import re
from enum import Enum, auto
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NAME_CHARS = 1024
_CUT_CHARS = 980  # leaves room for a digest and for "#123456"
_RESERVED = "__metadata__"  # safetensors keeps it for itself
_ALONE = "value"  # of a state that is nothing but one leaf
_SHOWN_CHARS = 60
_ABOVE = re.compile(r"(?:^|(?<=/))\.\.(?=/|$)")
# Fixed, whatever this Python's Unicode tables say is printable: a later one's names stay readable.
_UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f\\\\\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


class StepKind(Enum):
    """How one value is reached from the one that holds it."""

    KEY = auto()
    INDEX = auto()
    FIELD = auto()
    ELEMENT = auto()


Step: TypeAlias = tuple[StepKind, object]


def path_text(root: str, steps: Sequence[Step]) -> str:
    """A path for people: `optimizer.param_groups[0]['fn']`."""
    text = root or "state"
    for depth, (kind, value) in enumerate(steps):
        if kind is StepKind.FIELD or (depth == 0 and _is_identifier(value)):
            text += f".{value}"
        elif kind is StepKind.ELEMENT:
            text += "{...}"
        else:
            text += f"[{_shown(value)}]"
    return text


def _is_identifier(key: object) -> bool:
    return type(key) is str and key.isidentifier()


def _shown(key: object) -> str:
    if key is None or type(key) in (bool, float, complex, str, bytes):
        return _clipped(repr(key))
    return _clipped(_int_text(key)) if type(key) is int else f"<{type(key).__name__}>"


def _clipped(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


class LeafNames:
    """Hands out names: the steps as the trainer has them, joined with ".", and no name twice.

    What cannot stand in a name is written %XX, byte by byte. A second leaf whose steps give the
    same name gets "#2" at its end. The same state in the same order gives the same names.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._suffixes: dict[str, int] = {}

    def take(self, steps: Sequence[Step]) -> str:
        """A name for the leaf there."""
        text = ".".join([v if type(v) is str else _part(v) for _, v in steps])
        name = fit_name(text) if steps else _ALONE
        if name in self._taken:
            number = self._suffixes.get(name, 2)
            while f"{name}#{number}" in self._taken:
                number += 1
            self._suffixes[name] = number + 1
            name = f"{name}#{number}"
        self._taken.add(name)
        return name


def _part(value: object) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, bytes):
        return value.hex()
    if type(value) is int:
        return _int_text(value)
    if type(value) is tuple:
        return f"({','.join(_part(item) for item in value)})"
    if value is None or isinstance(value, str | bool | float | complex | np.generic):
        return str(value)
    return type(value).__name__


def _int_text(value: object) -> str:
    # Python refuses to write more than a few thousand decimal digits; hex has no such limit.
    assert isinstance(value, int)
    return str(value) if value.bit_length() <= 256 else f"{value:#x}"


@lru_cache(maxsize=100_000)
def fit_name(text: str) -> str:
    """A text made into a leaf's name: a fit one stays as it is.

    Printable, 1 to 1000 characters, not `__metadata__`, no backslash, no `/` in front, no `..`
    between slashes.
    """
    if not text.isprintable() or "\\" in text:
        text = "".join(c if c.isprintable() and c != "\\" else _escaped(c) for c in text)
    if ".." in text:
        text = _ABOVE.sub("%2E%2E", text)
    if text.startswith("/") or text == _RESERVED:
        text = _escaped(text[0]) + text[1:]
    if len(text) > _CUT_CHARS:
        text = f"{text[:_CUT_CHARS]}~{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
    return text or "%"


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def is_leaf_name(text: object) -> bool:
    """Whether `LeafNames` could have handed out this name, now or in a later Unicode."""
    return (
        type(text) is str
        and 0 < len(text) <= MAX_NAME_CHARS
        and text != _RESERVED
        and not text.startswith("/")
        and _UNFIT.search(text) is None
        and (".." not in text or _ABOVE.search(text) is None)
    )
