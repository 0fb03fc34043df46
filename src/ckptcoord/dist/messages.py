"""What ranks say to one another: JSON values, checked for shape where they are read.

A post is `{"in": operation and phase, "ok": value}`, or with "error" in the place of "ok".
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.errors import CkptError, ConfigError, DisagreementError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAX_TEXT = 10_000  # characters of any one text in an error that goes to other ranks
_MAX_REASON = 2_000  # of the reason of one rank, in what all ranks hear


def as_dict(value: JsonValue) -> dict[str, JsonValue]:
    """The object that a message must hold here."""
    if not isinstance(value, dict):
        raise ConfigError(field="message", why=f"is a {type(value).__name__}, not an object")
    return value


def as_list(value: JsonValue) -> list[JsonValue]:
    """The list that a message must hold here."""
    if not isinstance(value, list):
        raise ConfigError(field="message", why=f"is a {type(value).__name__}, not a list")
    return value


def as_int(value: JsonValue) -> int:
    """The integer that a message must hold here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(field="message", why=f"is a {type(value).__name__}, not an int")
    return value


def as_number(value: JsonValue) -> float:
    """The number that a message must hold here."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(field="message", why=f"is a {type(value).__name__}, not a number")
    return float(value)


def posted(say: JsonValue | CkptError, where: str) -> tuple[bytes, CkptError | None]:
    """What a rank posts, and its error if that is one; what JSON cannot hold is one, too."""
    if not isinstance(say, CkptError):
        try:
            return dump_json({"in": where, "ok": say}), None
        except (TypeError, ValueError, RecursionError) as error:
            say = CkptError(what=f"what this rank says cannot be sent: {error}")
            say.__cause__ = error
    return dump_json({"in": where, "error": document_of(say)}), say


def word_of(post: bytes, path: str) -> dict[str, JsonValue]:
    """What another rank posted; one that cannot be read is that rank's error."""
    try:
        return as_dict(parse_json(post, path=path))
    except CkptError as error:
        return {"error": document_of(error)}


def same_on_all(field: str, said: Sequence[JsonValue]) -> None:
    """Every rank said the same.

    Raises:
        DisagreementError: says who said what.
    """
    values: dict[str, list[int]] = {}
    for rank, value in enumerate(said):
        values.setdefault(str(value), []).append(rank)
    if len(values) > 1:
        raise DisagreementError(field=field, values=values)


def check_same_operation(words: dict[int, dict[str, JsonValue]]) -> None:
    """The ranks' words are of one operation and phase.

    Raises:
        DisagreementError: says which rank is where.
    """
    places: dict[str, list[int]] = {}
    for rank, word in words.items():
        if "in" in word:
            places.setdefault(str(word["in"]), []).append(rank)
    if len(places) > 1:
        raise DisagreementError(field="operation", values=places)


def document_of(error: CkptError) -> JsonValue:
    """The error as other ranks hear it: of bounded size, and such as JSON can hold."""
    return _sayable(error.to_document())


def _sayable(value: object) -> JsonValue:
    if isinstance(value, dict):
        return {_text(str(key)): _sayable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float) else _text(str(value))


def _text(text: str, most: int = _MAX_TEXT) -> str:
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return cut.encode("utf-8", "backslashreplace").decode("utf-8")


def reason_of(document: dict[str, JsonValue]) -> str:
    """One line of an error's document."""
    return _text(f"{document.get('type')}: {document.get('what')}", _MAX_REASON)
