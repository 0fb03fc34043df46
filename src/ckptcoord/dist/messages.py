"""What ranks say to one another: JSON values, checked for shape where they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from ckptcoord.core.jsonio import JsonValue


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
