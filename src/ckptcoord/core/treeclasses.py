"""The classes that a state may hold instances of: enums, namedtuples and dataclasses.

A class is written `module:qualname`. Reading looks it up among the modules that are loaded already
and never imports one, so that a document cannot choose which code runs; instances are made without
calling a constructor.
"""

from __future__ import annotations

import dataclasses
import sys
from enum import Enum, Flag
from types import MemberDescriptorType, ModuleType
from typing import TYPE_CHECKING, cast

from ckptcoord.core.treecodec import decode_hex_int, is_plain_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.core.jsonio import JsonValue


def class_name(cls: type) -> str:
    """How a class is written.

    Raises:
        ValueError: reading could not find it again.
    """
    name = f"{cls.__module__}:{cls.__qualname__}"
    try:
        found = find_class(name) if is_class_name(name) else None
    except ValueError:
        found = None
    if found is not cls:
        raise ValueError(f"its class is not found under the name {name}")
    return name


def is_class_name(name: str) -> bool:
    """Whether `class_name` could have written it."""
    module, _, qualname = name.partition(":")
    return (
        bool(module) and is_plain_text(module) and all(map(str.isidentifier, qualname.split(".")))
    )


def find_class(name: str) -> type:
    """The class that `class_name` wrote.

    Raises:
        ValueError: its module is not loaded or has no such class.
    """
    module_name, _, qualname = name.partition(":")
    found: object = sys.modules.get(module_name)
    if not isinstance(found, ModuleType):
        raise ValueError(  # noqa: TRY004 (a document's fault, not a caller's)
            f"holds a {qualname[:80]!r} of the module {module_name[:80]!r}, which is not loaded: "
            f"import it first"
        )
    for part in qualname.split("."):
        found = _namespace(found).get(part)
    if not isinstance(found, type):
        raise ValueError(  # noqa: TRY004 (a document's fault, not a caller's)
            f"holds a {qualname[:80]!r} of the module {module_name[:80]!r}, which has no such class"
        )
    return found


def _namespace(owner: object) -> Mapping[str, object]:
    # Not getattr: a module's or metaclass's own __getattr__ could import and run anything.
    if isinstance(owner, ModuleType):
        return cast("Mapping[str, object]", object.__getattribute__(owner, "__dict__"))
    return type.__getattribute__(owner, "__dict__") if isinstance(owner, type) else {}


# --- enums ---------------------------------------------------------------------------------------


def encode_enum(member: Enum) -> JsonValue:
    """An enum's member, or a combination of a flag's.

    Raises:
        ValueError: reading could not find it again.
    """
    name, bits = class_name(type(member)), member.value
    if type(member).__members__.get(member.name or "") is member and is_plain_text(member.name):
        return {"$": "enum", "class": name, "name": member.name}
    if not isinstance(member, Flag) or type(bits) is not int:
        raise ValueError("it is no member of its class")
    if decode_flag(name, f"{bits:x}") != member:
        raise ValueError("its class has another combination of that value")
    return {"$": "flag", "class": name, "bits": f"{bits:x}"}


def decode_enum(name: str, member_name: str) -> Enum:
    """The member of that name.

    Raises:
        ValueError: no such enum or member.
    """
    cls = find_class(name)
    member = cls.__members__.get(member_name) if issubclass(cls, Enum) else None
    if member is None:
        raise ValueError(f"holds {member_name[:80]!r}, which is no member of an enum {name[:80]}")
    return member


def decode_flag(name: str, bits: str) -> Flag:
    """The combination of members with that value.

    Raises:
        ValueError: no such flag or combination, or the class makes members by code of its own.
    """
    cls, value = find_class(name), decode_hex_int(bits)
    if not issubclass(cls, Flag) or getattr(cls._missing_, "__func__", None) is not _FLAG_MISSING:
        raise ValueError(f"holds a combination of {name[:80]}, which is no plain flag")
    member: object = cls(value)
    if type(member) is not cls:
        raise ValueError(f"holds {bits[:80]}, which is no combination of {name[:80]}")
    return member


_FLAG_MISSING = getattr(Flag._missing_, "__func__", None)


# --- namedtuples ---------------------------------------------------------------------------------


def is_namedtuple(cls: type) -> bool:
    """Whether it is a class that `collections.namedtuple` or `typing.NamedTuple` made."""
    fields = getattr(cls, "_fields", None)
    return (
        issubclass(cls, tuple)
        and isinstance(fields, tuple)
        and all(type(field) is str and field.isidentifier() for field in fields)
    )


def namedtuple_items(value: tuple[object, ...]) -> list[tuple[str, object]]:
    """Its items with their names.

    Raises:
        ValueError: it is more or less than that.
    """
    fields: tuple[str, ...] = getattr(type(value), "_fields", ())
    if len(fields) != len(value) or getattr(value, "__dict__", None):
        raise ValueError("it holds more or less than its named items")
    return list(zip(fields, value, strict=True))


def build_namedtuple(name: str, values: Mapping[str, object]) -> object:
    """A namedtuple with these items.

    Raises:
        ValueError: no such class, or it has other fields now.
    """
    cls = find_class(name)
    if not is_namedtuple(cls):
        raise ValueError(f"holds a namedtuple {name[:80]}, which is none here")
    fields: tuple[str, ...] = getattr(cls, "_fields", ())
    _check_same_fields(name, fields, values)
    return tuple.__new__(cls, [values[field] for field in fields])


# --- dataclasses ---------------------------------------------------------------------------------


def dataclass_items(value: object) -> list[tuple[str, object]]:
    """The fields and their values.

    Raises:
        ValueError: it is more or less than that, or could not be rebuilt from it.
    """
    fields = _rebuildable_fields(type(value))
    unset = [field for field in fields if not hasattr(value, field)]
    if unset:
        raise ValueError(f"its field {unset[0]!r} is not set")
    slots = (n for c in type(value).__mro__ for n, d in vars(c).items() if _is_slot(d))
    beside = {n for n in slots if hasattr(value, n)} | set(getattr(value, "__dict__", ()))
    if beside - set(fields):
        raise ValueError(f"its attribute {min(beside - set(fields))!r} is no field")
    return [(field, getattr(value, field)) for field in fields]


def build_dataclass(name: str, values: Mapping[str, object]) -> object:
    """A dataclass's instance with these fields. None of its own code runs.

    Raises:
        ValueError: no such class, it has other fields now, or it is more than its fields.
    """
    cls = find_class(name)
    try:
        fields = _rebuildable_fields(cls)
    except ValueError as error:
        raise ValueError(f"holds a dataclass {name[:80]}, but {error}") from error
    _check_same_fields(name, fields, values)
    built: object = object.__new__(cls)
    for field in fields:
        object.__setattr__(built, field, values[field])
    return built


def _rebuildable_fields(cls: type) -> tuple[str, ...]:
    if not dataclasses.is_dataclass(cls):
        raise ValueError("its class is no dataclass")
    if hasattr(cls, "__del__"):
        raise ValueError("its class has a __del__")  # it would see what no __init__ has made
    try:
        object.__new__(cls)
    except TypeError as error:
        raise ValueError("its class is more than a dataclass") from error
    fields = tuple(field.name for field in dataclasses.fields(cls))
    for field in fields:
        found = next((vars(c)[field] for c in cls.__mro__ if field in vars(c)), None)
        if hasattr(type(found), "__set__") and not _is_slot(found):
            raise ValueError(f"its field {field!r} is set by code of its own")
    return fields


def _is_slot(found: object) -> bool:
    return isinstance(found, MemberDescriptorType)


def _check_same_fields(name: str, fields: tuple[str, ...], values: Mapping[str, object]) -> None:
    if set(fields) != set(values):
        changed = sorted(set(fields) ^ set(values))
        raise ValueError(
            f"holds a {name[:80]} that differs from today's in the fields {changed[:8]}"
        )
