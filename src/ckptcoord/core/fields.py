"""Reading a JSON object field by field, and no field more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from ckptcoord.errors import ConfigError, InvalidNameError, ManifestError

if TYPE_CHECKING:
    from types import TracebackType

    from ckptcoord.core.jsonio import JsonValue


class Fields:
    """The fields of one object; at the end of its block, each must have been asked for.

    Within the block a ConfigError or InvalidNameError becomes a ManifestError, so that values check
    themselves in one place.

    Args:
        value: what should be an object.
        path: what the errors name.
        within: what stands before a field's name in the errors, where the object is in another.

    Raises:
        ManifestError: the value is no object, or a field is missing, of another type or unknown.
    """

    def __init__(self, value: JsonValue, *, path: str, within: str = "") -> None:
        if not isinstance(value, dict):
            raise ManifestError(path=path, why=f"{within} is not a JSON object".lstrip())
        self._given = value
        self._left = value.copy()
        self._path = path
        self._within = f"{within}." if within else ""

    def value(self, name: str) -> JsonValue:
        """Any JSON value."""
        try:
            return self._left.pop(name)
        except KeyError:
            raise self._wrong(name, "there") from None

    def expect(self, name: str, text: str) -> None:
        """Exactly this text."""
        if self.value(name) != text:
            raise ManifestError(path=self._path, why=f"{self._within}{name}: is not {text!r}")

    def text(self, name: str) -> str:
        """A string."""
        value = self._left.pop(name, None)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """A string or null."""
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "a string or null")
        return value

    def integer(self, name: str) -> int:
        """An integer, which a boolean is not."""
        value = self._left.pop(name, None)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "an integer")
        return value

    def items(self, name: str) -> list[JsonValue]:
        """A list of anything."""
        value = self._left.pop(name, None)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.items(name)
        if not values:  # of a thousand commits, most lists are empty: spare the generator
            return ()
        texts = tuple(value for value in values if isinstance(value, str))
        if len(texts) < len(values):
            raise self._wrong(name, "a list of strings")
        return texts

    def text_items(self, name: str) -> tuple[tuple[str, str], ...]:
        """An object of strings, as pairs."""
        value = self._left.pop(name, None)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        pairs = tuple((key, text) for key, text in value.items() if isinstance(text, str))
        if len(pairs) < len(value):
            raise self._wrong(name, "an object of strings")
        return pairs

    def optional_object(self, name: str) -> dict[str, JsonValue]:
        """An object with something in it; an empty one where there is no such field."""
        value = self._left.pop(name, None)
        if name not in self._given:
            return {}
        if not isinstance(value, dict) or not value:
            raise self._wrong(name, "an object with something in it")
        return value

    def floats(self, name: str) -> dict[str, float]:
        """An object of floats."""
        value = self._left.pop(name, None)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        floats = {key: number for key, number in value.items() if isinstance(number, float)}
        if len(floats) < len(value):
            raise self._wrong(name, "an object of floats")
        return floats

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(exc, (ConfigError, InvalidNameError)):
            where = f"{self._within[:-1]}: " if self._within else ""
            raise ManifestError(path=self._path, why=where + exc.what) from exc
        if exc is None and self._left:
            unknown = min(self._left)[:80]
            raise ManifestError(path=self._path, why=f"{self._within}{unknown!r}: unknown field")

    def _wrong(self, name: str, wanted: str) -> ManifestError:
        why = f"is not {wanted}" if name in self._given else "is missing"
        return ManifestError(path=self._path, why=f"{self._within}{name}: {why}")
