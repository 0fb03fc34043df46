"""Folders of torch.distributed.checkpoint, on whatever number of ranks they were saved.

`.metadata` is a pickle, which torch's own reader runs. Here it is read as data: which tensors there
are, and in which file, from which byte on, each chunk of one is. A chunk is a file of torch.save in
the middle of another file. Of a tensor's chunks all is checked first but the elements, which are
read when they are used, a tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ckptcoord.codec.tensorspec import TensorSpec
from ckptcoord.core.box import Box, covers_once
from ckptcoord.dist.capture import DTYPE_NAMES
from ckptcoord.errors import CkptError, CorruptError, FormatError
from ckptcoord.formats.components import deal_out
from ckptcoord.formats.folder import RECOPY
from ckptcoord.formats.late import LateTensor
from ckptcoord.formats.pickles import MAX_PICKLE_BYTES, Call, Global, read_pickle
from ckptcoord.formats.spill import scratch
from ckptcoord.formats.torchfile import load_torch_part

if TYPE_CHECKING:
    from ckptcoord.formats.folder import SourceFolder
    from ckptcoord.formats.source import SourceState

METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint."
_TENSOR, _BYTES = (
    f"{_MODULE}metadata.TensorStorageMetadata",
    f"{_MODULE}metadata.BytesStorageMetadata",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    file: str
    begin: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    spec: TensorSpec
    dtype: torch.dtype
    boxes: tuple[Box, ...]


def read_dcp(folder: SourceFolder) -> SourceState:
    """What a folder holds, dealt out to components.

    Raises:
        CorruptError: the metadata is damaged, or the files do not hold what it says.
        FormatError: it has tensors or values of a kind that is not known.
    """
    return _Reader(folder).read()


class _Reader:
    def __init__(self, folder: SourceFolder) -> None:
        self._folder, self._path = folder, folder.shown(METADATA)
        self._sizes: dict[str, int] = {}

    def read(self) -> SourceState:
        data = self._folder.read(METADATA, limit_bytes=MAX_PICKLE_BYTES)
        metadata = read_pickle(data, path=self._path).value
        try:
            fields = _fields(metadata, f"{_MODULE}metadata.Metadata")
            named = {
                str(name): self._entry(str(name), one)
                for name, one in fields["state_dict_metadata"].items()
            }
            chunks = self._chunks(fields["storage_data"])
            paths = fields.get("planner_data")
        # It is built for sound metadata; what is not trips over one of these.
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise self._error(f"is no sound metadata ({error})") from error
        self._check_room(named, chunks)
        flat = {name: self._value(name, one, chunks) for name, one in named.items()}
        return deal_out(_nested(flat, paths, self._error), ordered=False)

    def _entry(self, name: str, saved: Call) -> _Tensor | None:
        """A tensor; None for what is a value."""
        if saved.name == _BYTES:
            return None
        fields = _fields(saved, _TENSOR)
        dtype = _dtype_of(fields["properties"])
        if dtype not in DTYPE_NAMES:
            raise FormatError(path=self._path, why=f"has {name!r:.200} of the dtype {dtype}")
        spec = TensorSpec(name="tensor", dtype=DTYPE_NAMES[dtype], shape=_size(fields["size"]))
        boxes = []
        for one in fields["chunks"]:
            chunk = _fields(one, f"{_MODULE}metadata.ChunkStorageMetadata")
            boxes.append(Box(offset=_size(chunk["offsets"]), size=_size(chunk["sizes"])))
        whole = Box.whole(spec.shape)
        if not all(box.within(spec.shape) for box in boxes) or not covers_once(boxes, whole):
            raise ValueError(f"the chunks of {name!r:.200} do not make it up")
        return _Tensor(spec=spec, dtype=dtype, boxes=tuple(boxes))

    def _chunks(self, saved: Mapping[Call, Call]) -> dict[tuple[str, tuple[int, ...]], _Chunk]:
        """Where each chunk is, by name and offset; that of a value by name alone."""
        found = {}
        for index, info in saved.items():
            key = _fields(index, f"{_MODULE}metadata.MetadataIndex")
            place = _fields(info, f"{_MODULE}filesystem._StorageInfo")
            if place.get("transform_descriptors"):
                raise FormatError(path=self._path, why="has files that were transformed")
            file, begin, length = place["relative_path"], place["offset"], place["length"]
            if type(file) is not str or type(begin) is not int or type(length) is not int:
                raise TypeError("a place in a file that is none")
            offset = key.get("offset")
            name = str(key["fqn"]), () if offset is None else _size(offset)
            found[name] = _Chunk(file=file, begin=begin, length=length)
        return found

    def _check_room(
        self,
        named: Mapping[str, _Tensor | None],
        chunks: Mapping[tuple[str, tuple[int, ...]], _Chunk],
    ) -> None:
        """All chunks are there and long enough, before memory is taken for any tensor."""
        for name, one in named.items():
            boxes = (Box(offset=(), size=()),) if one is None else one.boxes
            for box in boxes:
                chunk = chunks.get((name, box.offset))
                if chunk is None:
                    raise self._error(f"says of no file that it holds {name!r:.200}")
                need = 0 if one is None else math.prod(box.size) * one.dtype.itemsize
                held = self._size_of(chunk.file)
                if not 0 <= chunk.begin <= chunk.begin + chunk.length <= held:
                    raise self._error(f"has {name!r:.200} past the end of {chunk.file!r:.80}")
                if chunk.length < need:
                    raise self._error(f"has {name!r:.200} in fewer bytes than it needs")

    def _value(
        self,
        name: str,
        one: _Tensor | None,
        chunks: Mapping[tuple[str, tuple[int, ...]], _Chunk],
    ) -> Any:  # noqa: ANN401 (whatever was saved)
        if one is None:
            return self._read(chunks[name, ()])
        parts = tuple((box, chunks[name, box.offset]) for box in one.boxes)
        for box, chunk in parts:
            self._part(name, one, box, chunk, meta=True)
        if not one.spec.nbytes:
            return torch.empty(one.spec.shape, dtype=one.dtype)
        return LateTensor(partial(self._whole, name, one, parts), one.dtype, one.spec.shape)

    def _whole(self, name: str, one: _Tensor, parts: Sequence[tuple[Box, _Chunk]]) -> torch.Tensor:
        """A tensor in memory; of its parts, one at a time is there as well."""
        if len(parts) == 1:
            return self._part(name, one, *parts[0])
        whole = scratch(one.spec)
        for box, chunk in parts:
            place = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
            whole[place] = self._part(name, one, box, chunk)
        return whole

    def _part(
        self, name: str, one: _Tensor, box: Box, chunk: _Chunk, *, meta: bool = False
    ) -> torch.Tensor:
        part = self._read(chunk, meta=meta)
        if (
            not isinstance(part, torch.Tensor)
            or tuple(part.shape) != box.size
            or part.dtype != one.dtype
            or part.layout is not torch.strided
        ):
            raise self._error(f"says {name!r:.200} is what {chunk.file!r:.80} does not hold")
        return part.detach()

    def _read(self, chunk: _Chunk, *, meta: bool = False) -> Any:  # noqa: ANN401 (whatever was saved)
        path = f"{self._folder.shown(chunk.file)} from byte {chunk.begin}"
        with self._folder.part(chunk.file, chunk.begin, chunk.length) as file:
            return load_torch_part(file, chunk.length, path, meta=meta)

    def _size_of(self, name: str) -> int:
        if name not in self._sizes:
            self._sizes[name] = self._folder.size_bytes(name)
        return self._sizes[name]

    def _error(self, why: str) -> CkptError:
        return CorruptError(path=self._path, why=why, help=RECOPY)


def _fields(saved: object, kind: str) -> dict[str, Any]:
    """The fields of a saved object, which is of that class."""
    if not isinstance(saved, Call) or saved.name != kind or not saved.new:
        raise TypeError(f"no {kind.rpartition('.')[2]}")
    state = saved.state
    if isinstance(state, tuple) and len(state) == 2 and state[0] is None:
        state = state[1]  # of a class with slots
    if state is None and not saved.args:
        return {}
    if not isinstance(state, dict) or not all(type(key) is str for key in state):
        raise TypeError(f"a {kind.rpartition('.')[2]} without fields")
    return state


def _dtype_of(properties: object) -> torch.dtype:
    if not isinstance(properties, Call) or not isinstance(properties.state, tuple):
        raise TypeError("a tensor without properties")
    dtype = properties.state[0]
    if not isinstance(dtype, Global) or not dtype.name.startswith("torch."):
        raise TypeError("a tensor without a dtype")
    found = getattr(torch, dtype.name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise TypeError("a tensor of no dtype that this torch has")
    return found


def _size(saved: object) -> tuple[int, ...]:
    sizes = saved.args[0] if isinstance(saved, Call) and saved.name == "torch.Size" else saved
    if not isinstance(sizes, tuple) or not all(type(n) is int and n >= 0 for n in sizes):
        raise TypeError("a size that is none")
    return sizes


def _nested(flat: Mapping[str, Any], paths: object, error: Any) -> dict[str, Any]:  # noqa: ANN401 (a function)
    """The state as it was before its names were joined.

    Args:
        flat: by joined name.
        paths: the keys on the way to each; None where the state was flat.
        error: makes one of a text.
    """
    if not isinstance(paths, Mapping) or not set(flat) <= set(paths):
        return dict(flat)
    top: dict[Any, Any] = {}
    for name, value in flat.items():
        steps = paths[name]
        if (
            not isinstance(steps, tuple)
            or not steps
            or len(steps) > 100
            or not all(isinstance(s, str | int) for s in steps)
        ):
            raise error(f"has no path to {name!r:.200}")
        here = top
        for step in steps[:-1]:
            here = here.setdefault(step, {})
            if not isinstance(here, dict):
                raise error(f"has {name!r:.200} below a value")
        if steps[-1] in here:
            raise error(f"has {name!r:.200} twice")
        here[steps[-1]] = value
    return {key: _lists(value) for key, value in top.items()}


def _lists(value: Any) -> Any:  # noqa: ANN401 (whatever was saved)
    """Mappings by 0, 1, 2 and so on were lists."""
    if not isinstance(value, dict):
        return value
    inner = {key: _lists(one) for key, one in value.items()}
    if (
        inner
        and all(type(key) is int for key in inner)
        and sorted(inner) == list(range(len(inner)))
    ):
        return [inner[index] for index in range(len(inner))]
    return inner
