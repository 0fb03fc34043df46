"""Reading the fields of a manifest, each of its kind and within its bounds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeVar

from ckptcoord.core import manifest_fields as law
from ckptcoord.core.digest import Digest
from ckptcoord.core.fields import Fields
from ckptcoord.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Callable
    from enum import StrEnum

    from ckptcoord.core.jsonio import JsonValue

_PATH = re.compile(law.PATH)
_ATTEMPT = re.compile(law.ATTEMPT)
_Value = TypeVar("_Value")
_Kind = TypeVar("_Kind", bound="StrEnum")


class ManifestReader(Fields):
    """Each method takes the field of a name; a breach is a ManifestError."""

    def nullable(self, name: str, read: Callable[[str], _Value]) -> _Value | None:
        """What `read` takes, or null."""
        if self._left.get(name, "") is None:
            del self._left[name]
            return None
        return read(name)

    def boolean(self, name: str) -> bool:
        """True or false."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def count(self, name: str, *, least: int = 0, most: int = law.MAX_SIZE_BYTES) -> int:
        """An integer within bounds."""
        return self._bounded(name, self.integer(name), least, most)

    def counts(self, name: str, most: int) -> tuple[int, ...]:
        """A list of so many sizes at most."""
        values = self.items(name)
        if len(values) > most:
            raise self._wrong(name, f"a list of at most {most}")
        return tuple(self._bounded(name, value, 0, law.MAX_SIZE_BYTES) for value in values)

    def amount(self, name: str) -> float:
        """A number that is not under zero, as a float."""
        number = self._float(name, self.value(name))
        if number < 0:
            raise self._wrong(name, "a number from 0")
        return number

    def numbers(self, name: str) -> dict[str, float]:
        """An object of numbers, as floats, by their sorted names."""
        return {
            key: self._float(name, number) for key, number in sorted(self.mapping(name).items())
        }

    def mapping(self, name: str) -> dict[str, JsonValue]:
        """An object of anything."""
        value = self.value(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return value

    def metadata(self, name: str) -> dict[str, object]:
        """An object of anything, not too deep, with all keys sorted."""
        found = self.mapping(name)
        try:
            return {
                key: law.sorted_json(found[key], law.MAX_METADATA_DEPTH - 1)
                for key in sorted(found)
            }
        except ValueError as error:
            raise self._because(name, error) from error

    def member(self, name: str, kind: type[_Kind]) -> _Kind:
        """A member of an enumeration, by its value."""
        try:
            return kind(self.text(name))
        except ValueError as error:
            raise self._wrong(name, f"one of {', '.join(kind)}") from error

    def digest(self, name: str) -> Digest:
        """A digest."""
        return Digest.parse(self.text(name))

    def path(self, name: str) -> str:
        """The path of a file in the checkpoint's folder."""
        text = self._short(name, 1, law.MAX_PATH_CHARS)
        if _PATH.fullmatch(text) is None:
            raise self._wrong(name, "a file's path")
        return text

    def scope(self, name: str) -> str:
        """The label of a copy."""
        return self._short(name, 0, law.MAX_SCOPE_CHARS)

    def short_text(self, name: str) -> str:
        """A string that is neither empty nor long."""
        return self._short(name, 1, law.MAX_SHORT_CHARS)

    def nonce(self, name: str) -> str:
        """A nonce."""
        text = self.text(name)
        if _ATTEMPT.fullmatch(text) is None:
            raise self._wrong(name, "32 hex digits")
        return text

    def timestamp(self, name: str) -> str:
        """A time."""
        try:
            return law.check_timestamp(self.text(name))
        except ValueError as error:
            raise self._because(name, error) from error

    def _short(self, name: str, least: int, most: int) -> str:
        text = self.text(name)
        if not least <= len(text) <= most:
            raise self._wrong(name, f"a string of {least} to {most} characters")
        return text

    def _bounded(self, name: str, value: JsonValue, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(name, f"an integer from {least} to {most}")
        return value

    def _float(self, name: str, value: JsonValue) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, "a number")
        return float(value)

    def _because(self, name: str, error: ValueError) -> ManifestError:
        return ManifestError(path=self._path, why=f"{self._within}{name}: {error}")
