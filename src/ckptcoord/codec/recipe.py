"""What a delta file says of its tensors: how each is made again, and out of what.

A delta file is a safetensors file whose entries are 1-D U8: the coded parts of one tensor, one
after another. Its `__metadata__` holds under `ckptcoord.delta` what this module writes:

    {"format_version": 1, "part_bytes": 4194304,
     "sources": [["checkpoint-500/model.safetensors", 1073741824, "blake3:..."], ...],
     "tensors": {name: {"dtype", "shape", "digest", "how", "from": [source, name],
                        "parts": [...], "xxh3": "...", "step": 1e-05,
                        "given_up": [1e-05, 0.001]}}}

`how` is `coded` (the parts, decoded over the source's bytes where there is a source), `same` (the
source's bytes), `cast` (the source rounded to this dtype) or `update` (the source and so many steps
of `step` for each element, zigzag, coded as U32). `xxh3` has the XXH3-128 of what each part is
decoded to, in hexadecimal, one after another. Where that is not what the trainer had,
`given_up` says how far it is off: the largest difference, and the relative L2 norm of all. A source
is a file of the repository, or `./file` in the delta's own folder, which has no digest here: the
tensor's own decides.

A document is hostile. `parse_recipes` checks it as a whole; what it says of one tensor is checked
when somebody asks for that tensor, so that one of many thousands can be read at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn

from ckptcoord.codec.bounded import UPDATE_DTYPES, GivenUp
from ckptcoord.codec.digest import XXH3_BYTES
from ckptcoord.codec.givenup import parse_given_up
from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.core.digest import Digest
from ckptcoord.core.fields import Fields
from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.core.refs import is_checkpoint_folder
from ckptcoord.errors import ConfigError, CorruptError, FormatVersionError, InvalidNameError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ckptcoord.codec.tensorfile import TensorEntry, TensorHeader

DELTA_KEY = "ckptcoord.delta"
PART_BYTES = 4 << 20  # what is coded, read and decoded at a time; a part needs no other part
STEPS_DTYPE = "U32"  # what the steps of an update are coded as
FORMAT_VERSION = 1
CAST_FROM: Mapping[str, str] = {"BF16": "F32", "F16": "F32", "F32": "F64"}
_MAX_BYTES = 100_000_000
_MAX_SOURCES = 100_000
MAX_PART_BYTES = 2 * PART_BYTES  # of a coded part; it is read into memory whole
_HERE = "./"
_HEXADECIMAL = frozenset("0123456789abcdef")


class How(StrEnum):
    """How a tensor is made again."""

    CODED = "coded"
    SAME = "same"
    CAST = "cast"
    UPDATE = "update"


_HOWS = frozenset(How)
_STORED = frozenset({How.CODED, How.UPDATE})


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """A shard that a tensor is made out of.

    Attributes:
        path: `<checkpoint's folder>/<file>`, or `./<file>` in the delta's own folder.
        size_bytes: its size; 0 where it is not known.
        digest: its shard digest; None in the delta's own folder.
    """

    path: str
    size_bytes: int = 0
    digest: Digest | None = None

    @property
    def folder(self) -> str:
        """The checkpoint's folder; empty for the delta's own."""
        return "" if self.path.startswith(_HERE) else self.path.rpartition("/")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one tensor is made again.

    Attributes:
        digest: of the tensor's raw bytes.
        source: what it is made out of, and the tensor's name there; None where nothing is needed.
        parts: of a CODED one and of an UPDATE, the coded bytes of each part in order.
        prints: of these, the XXH3-128 of what each part is decoded to; empty where nobody took it.
        step: of an UPDATE.
        given_up: how far it is from what the trainer had; None where it is that.
    """

    spec: TensorSpec
    digest: Digest
    how: How
    source: tuple[SourceFile, str] | None = None
    parts: tuple[int, ...] = ()
    prints: bytes = b""
    step: float = 0.0
    given_up: GivenUp | None = None

    @property
    def is_stored(self) -> bool:
        """Whether the file has bytes of it."""
        return self.how in _STORED


def part_count(nbytes: int) -> int:
    """How many parts a tensor has."""
    return -(-nbytes // PART_BYTES)


def render_recipes(recipes: Sequence[Recipe]) -> str:
    """The text that stands in the metadata."""
    files = list(dict.fromkeys(one.source[0] for one in recipes if one.source is not None))
    numbers = {file: number for number, file in enumerate(files)}
    document: dict[str, JsonValue] = {
        "format_version": FORMAT_VERSION,
        "part_bytes": PART_BYTES,
        "sources": [
            [file.path, file.size_bytes, None if file.digest is None else str(file.digest)]
            for file in files
        ],
        "tensors": {one.spec.name: _recipe_json(one, numbers) for one in recipes},
    }
    return dump_json(document).decode()


class Recipes(Mapping[str, Recipe]):
    """The recipes of a delta file by tensor, in the file's order.

    Asking for one raises CorruptError where it breaks the format or does not fit the stored entry.
    """

    def __init__(
        self,
        path: str,
        tensors: Mapping[str, JsonValue],
        sources: Sequence[SourceFile],
        stored: Mapping[str, TensorEntry],
    ) -> None:
        self._path = path
        self._tensors = tensors
        self._sources = sources
        self._stored = stored
        self._checked: dict[str, Recipe] = {}

    def __getitem__(self, name: str) -> Recipe:
        found = self._checked.get(name)
        if found is None:
            found = _recipe(self._path, name, self._tensors[name], self._sources)
            if found.is_stored:
                _check_stored(self._path, found, self._stored.get(name))
            self._checked[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors


def parse_recipes(text: str, stored: TensorHeader, *, path: str) -> Recipes:
    """Read the recipes of a delta file, and check all but what each says of its tensor.

    Args:
        text: what stands in the metadata.
        stored: the file's header.
        path: for errors.

    Raises:
        CorruptError: the text breaks the format, or there is an entry that no recipe stores.
        FormatVersionError: a newer ckptcoord wrote it.
    """
    value = parse_json(text.encode(), path=path, max_bytes=_MAX_BYTES, max_depth=8)
    version = value.get("format_version") if isinstance(value, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise FormatVersionError(path=path, found=version, supported=FORMAT_VERSION)
    with Fields(value, path=path) as fields:
        if fields.integer("format_version") != FORMAT_VERSION:
            _refuse(path, "its recipes have no format version")
        if fields.integer("part_bytes") != PART_BYTES:
            _refuse(path, f"its parts are not of {PART_BYTES} bytes")
        sources = [_source(path, item) for item in fields.items("sources")]
        tensors = fields.value("tensors")
    if len(sources) > _MAX_SOURCES or not isinstance(tensors, dict):
        _refuse(path, "its recipes name too many sources, or no tensors")
    entries = {entry.spec.name: entry for entry in stored.entries}
    for name in entries:
        recipe = tensors.get(name)
        how = recipe.get("how") if isinstance(recipe, dict) else None
        if not isinstance(how, str) or how not in _STORED:
            _refuse(path, f"its entry {name!r:.80} has no recipe")
    return Recipes(path, tensors, sources, entries)


def _recipe_json(recipe: Recipe, numbers: Mapping[SourceFile, int]) -> JsonValue:
    spec = recipe.spec
    value: dict[str, JsonValue] = {
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "digest": str(recipe.digest),
        "how": recipe.how.value,
    }
    if recipe.source is not None:
        file, name = recipe.source
        value["from"] = [numbers[file], name]
    if recipe.is_stored:
        value["parts"] = list(recipe.parts)
        if recipe.prints:
            value["xxh3"] = recipe.prints.hex()
    if recipe.how is How.UPDATE:
        value["step"] = recipe.step
    if recipe.given_up is not None:
        value["given_up"] = [recipe.given_up.max_abs, recipe.given_up.relative_l2]
    return value


def _source(path: str, value: JsonValue) -> SourceFile:
    match value:
        case [str(file), size, None] if file.startswith(_HERE) and size == 0 and type(size) is int:
            _check_file_name(path, file.removeprefix(_HERE))
            return SourceFile(path=file)
        case [str(file), int(size), str(digest)] if type(size) is int and size > 0:
            folder, _, name = file.partition("/")
            if not is_checkpoint_folder(folder):
                _refuse(path, f"its source {file!r:.80} is in no checkpoint's folder")
            _check_file_name(path, name)
            return SourceFile(path=file, size_bytes=size, digest=_digest(path, digest))
        case _:
            raise _fault(path, f"its source {ascii(value)[:80]} is malformed")


def _check_file_name(path: str, name: str) -> None:
    plain = name.replace(".", "").replace("_", "").replace("-", "")
    if not (plain.isascii() and plain.isalnum()) or name.startswith((".", "-")) or len(name) > 255:
        _refuse(path, f"its source has the name {ascii(name)[:80]}")


def _recipe(path: str, name: str, value: JsonValue, sources: Sequence[SourceFile]) -> Recipe:
    if not isinstance(value, dict):
        _refuse(path, f"the recipe of {name!r:.80} is no object")
    how = value.get("how")
    if not isinstance(how, str) or how not in _HOWS:
        _refuse(path, f"the recipe of {name!r:.80} is malformed")
    stored = how in _STORED
    with Fields({"from": None, "given_up": None, "xxh3": "", **value}, path=path) as fields:
        dtype, digest, how = fields.text("dtype"), fields.text("digest"), fields.text("how")
        shape, origin = fields.items("shape"), fields.value("from")
        parts, prints = fields.items("parts") if stored else [], fields.text("xxh3")
        step = fields.value("step") if how == How.UPDATE else 0.0
        given_up = fields.value("given_up")
    if not all(_is_part(part) for part in parts) or type(step) is not float:
        _refuse(path, f"the recipe of {name!r:.80} is malformed")
    try:
        spec = TensorSpec(name=name, dtype=dtype, shape=tuple(shape))  # type: ignore[arg-type]
    except (InvalidNameError, ConfigError) as error:
        raise CorruptError(path=path, why=f"its recipes are not sound: {error.what}") from error
    recipe = Recipe(
        spec=spec,
        digest=_digest(path, digest),
        how=How(how),
        source=None if origin is None else _origin(path, name, origin, sources),
        parts=tuple(part for part in parts if isinstance(part, int)),
        prints=_prints(path, name, prints, len(parts)),
        step=step,
        given_up=None if given_up is None else parse_given_up(path, name, given_up),
    )
    _check_recipe(path, recipe)
    return recipe


def _check_recipe(path: str, recipe: Recipe) -> None:
    name, dtype = recipe.spec.name, recipe.spec.dtype
    if recipe.source is None and recipe.how is not How.CODED:
        _refuse(path, f"tensor {name!r:.80} is made out of nothing")
    if recipe.how is How.UPDATE and dtype not in UPDATE_DTYPES:
        _refuse(path, f"tensor {name!r:.80} of {dtype} is an update")
    if recipe.is_stored and len(recipe.parts) != part_count(recipe.spec.nbytes):
        _refuse(path, f"tensor {name!r:.80} has {len(recipe.parts)} parts")
    if recipe.how is How.CAST and dtype not in CAST_FROM:
        _refuse(path, f"tensor {name!r:.80} is cast to {dtype}")


def _prints(path: str, name: str, text: str, parts: int) -> bytes:
    if not text:
        return b""
    if len(text) != 2 * XXH3_BYTES * parts or not set(text) <= _HEXADECIMAL:
        _refuse(path, f"the fingerprints of {name!r:.80} are not those of {parts} parts")
    return bytes.fromhex(text)


def _is_part(value: JsonValue) -> bool:
    return type(value) is int and 0 <= value <= MAX_PART_BYTES


def _origin(
    path: str, name: str, value: JsonValue, sources: Sequence[SourceFile]
) -> tuple[SourceFile, str]:
    match value:
        case [int(number), str(there)] if type(number) is int and 0 <= number < len(sources):
            return sources[number], there
        case _:
            raise _fault(path, f"tensor {name!r:.80} is made out of a source that is not listed")


def _check_stored(path: str, recipe: Recipe, entry: TensorEntry | None) -> None:
    """A coded tensor has its entry of exactly its parts."""
    spec = None if entry is None else entry.spec
    if spec is None or spec.dtype != "U8" or spec.shape != (sum(recipe.parts),):
        _refuse(path, f"tensor {recipe.spec.name!r:.80} has no entry of its parts' bytes")


def _digest(path: str, text: str) -> Digest:
    try:
        return Digest.parse(text)
    except (InvalidNameError, ConfigError, ValueError) as error:
        raise CorruptError(path=path, why=f"its recipes have the digest {text!r:.80}") from error


def _refuse(path: str, why: str) -> NoReturn:
    raise _fault(path, why)


def _fault(path: str, why: str) -> CorruptError:
    return CorruptError(path=path, why=why)
