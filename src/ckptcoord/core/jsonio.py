"""JSON as ckptcoord writes and reads it: canonical going out, strict coming in.

Whatever is read here may have been written by someone who means harm, so every limit is checked
before the step that it protects.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from ckptcoord.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Sequence

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

MAX_BYTES = 64 << 20
MAX_DEPTH = 128
MAX_INT_DIGITS = 64
_EACH = 4096  # values that are written at a time
_SLICE_BYTES = 1 << 20
_LONG_INT = b"0" * (MAX_INT_DIGITS + 1)

_ONE_BRACKET = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS_TO_0 = bytes(ord("0") if byte in b"0123456789" else ord(" ") for byte in range(256))
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Possessive throughout: linear, and no backtracking however long the text is.
_ONLY_PAIRED_SURROGATES = re.compile(
    r"""(?:[^\\]++                                                  # no escape
        |\\(?:[^u]                                                  # \n, \\, \"
             |u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]            # a pair's high half, low half
             |u(?![dD][89a-fA-F])))*+                               # any other character
    """,
    re.VERBOSE | re.DOTALL,
)


class _RefusedError(ValueError):
    """What a hook of the scanner does not accept."""


def dump_json(value: JsonValue, *, indent: int | None = None) -> bytes:
    r"""The one way to write a value: sorted keys, ASCII; compact, or indented with "\n" at the end.

    Raises:
        ValueError: NaN or an infinity is in it.
    """
    text = json.dumps(
        value,
        indent=indent,
        separators=(",", ":") if indent is None else (",", ": "),
        sort_keys=True,
        ensure_ascii=True,
        allow_nan=False,
    )
    return (text if indent is None else text + "\n").encode("ascii")


def dump_each(values: Sequence[JsonValue]) -> list[bytes]:
    """The texts of many values, each as `dump_json` has it; the interpreter is held for a few only.

    Raises:
        ValueError: NaN or an infinity is in one.
    """
    found: list[bytes] = []
    for start in range(0, len(values), _EACH):
        some = values[start : start + _EACH]
        scalars = [value for value in some if not isinstance(value, dict | list)]
        text = json.dumps(scalars, separators=("\n", ":"), ensure_ascii=True, allow_nan=False)
        texts = text[1:-1].encode("ascii").split(b"\n")  # no scalar's text has a line's end
        if len(scalars) == len(some):
            found += texts
            continue
        left = iter(texts)
        found += [dump_json(one) if isinstance(one, dict | list) else next(left) for one in some]
    return found


def parse_json(
    data: bytes, *, path: str, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH
) -> JsonValue:
    """The value of a JSON text in UTF-8.

    Args:
        data: the text.
        path: what the error names.
        max_bytes: the largest text that is looked at.
        max_depth: how many arrays and objects may stand inside one another.

    Raises:
        ManifestError: it is too large or too deep, is not UTF-8 or not JSON, repeats a key, or
            holds a NaN, an infinity, a float beyond a double's range, an integer of more than
            64 digits or a lone surrogate.
    """
    if len(data) > max_bytes:
        raise ManifestError(
            path=path, why=f"is {len(data):,} bytes long, over the limit of {max_bytes:,}"
        )
    if not _is_shallow(data, max_depth):
        raise ManifestError(path=path, why=f"is not JSON of at most {max_depth} levels")
    try:
        text = data.decode("utf-8")
        value: JsonValue = json.loads(
            text,
            object_pairs_hook=_unique,
            # The scanner is three times as fast with `int` itself, so the cap is asked for by need.
            parse_int=_small_int if _LONG_INT in data.translate(_DIGITS_TO_0) else int,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except UnicodeDecodeError as error:
        raise ManifestError(path=path, why=f"is not UTF-8 at byte {error.start:,}") from error
    except json.JSONDecodeError as error:
        raise ManifestError(path=path, why=f"is not JSON: {error}") from error
    except _RefusedError as error:
        raise ManifestError(path=path, why=str(error)) from error
    if _SURROGATE_ESCAPE.search(text) and not _ONLY_PAIRED_SURROGATES.fullmatch(text):
        raise ManifestError(path=path, why="holds half of a surrogate pair")
    return value


def _is_shallow(data: bytes, max_depth: int) -> bool:
    """Whether the scanner, which recurses, would stay within `max_depth`.

    Reduces the text to its brackets and takes out "][" between siblings, widest first: that keeps
    the greatest depth, and what remains is one run of "[" of that length before one of "]".
    """
    if data.count(b"[") + data.count(b"{") <= max_depth:
        return True
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _brackets_outside_strings(data)
    too_deep = b"[" * (max_depth + 1)  # looked for in each round, which also bounds the rounds
    for width in (64, 16, 4, 1):
        siblings, before = b"]" * width + b"[" * width, -1
        while len(brackets) != before:
            if too_deep in brackets:
                return False
            before, brackets = len(brackets), brackets.replace(siblings, b"")
    return True


def _brackets_outside_strings(data: bytes) -> bytes:
    """The brackets of a JSON text without escapes, braces as brackets."""
    found, inside_string = [], 0
    for start in range(0, len(data), _SLICE_BYTES):  # in slices: a split of all may need gigabytes
        parts = data[start : start + _SLICE_BYTES].split(b'"')
        found.append(b"".join(parts[inside_string::2]).translate(_ONE_BRACKET, _NO_BRACKETS))
        inside_string ^= (len(parts) - 1) & 1
    return b"".join(found)


def _unique(pairs: Sequence[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _RefusedError(f"holds the key {twice[:80]!r} twice in one object")
    return found


def _small_int(text: str) -> int:
    if len(text.removeprefix("-")) > MAX_INT_DIGITS:
        raise _RefusedError(f"holds an integer of over {MAX_INT_DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _RefusedError(f"holds the number {text[:40]}, which no double can hold")
    return value


def _no_constant(text: str) -> NoReturn:
    raise _RefusedError(f"holds {text}")
