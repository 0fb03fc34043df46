"""The trainer's state as named leaves: where torch ends and bytes begin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from ckptcoord.core.box import piece_name
from ckptcoord.core.jsonio import JsonValue, dump_json
from ckptcoord.core.sharing import SharingPattern, StateComponent, Stateful
from ckptcoord.core.tree import MAX_STATE_BYTES, flatten
from ckptcoord.dist.sharded import Layout, is_tensor, layout_of
from ckptcoord.errors import CkptError, ConfigError, UnsupportedStateError
from ckptcoord.repo.shards import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

_DTYPES: dict[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
    "complex128": "C128",
}
_OF_PIECES = (SharingPattern.PER_GROUP, SharingPattern.PER_RANK)
# A torch without one of these dtypes cannot hold a tensor of it either.
_PLAIN = (torch.Tensor, torch.nn.Parameter)
DTYPE_NAMES = {getattr(torch, name): code for name, code in _DTYPES.items() if hasattr(torch, name)}
TORCH_DTYPES = {code: dtype for dtype, code in DTYPE_NAMES.items()}


class TorchAdapter:
    """What the state tree needs to know of torch. One is for one state."""

    def __init__(self) -> None:
        # The values, too: another one could get a dead one's id.
        self._layouts: dict[int, tuple[object, Layout | None]] = {}

    def is_leaf(self, value: object) -> bool:
        """Whether it is a tensor."""
        return is_tensor(value)

    def identity(self, value: object) -> Hashable | None:
        """Equal for two views of the same elements: tied weights are stored once."""
        if type(value) not in _PLAIN:
            return self._piece_identity(value)
        return self._memory(value)

    def _piece_identity(self, value: object) -> Hashable | None:
        layout = self.layout(value)
        if layout is None:
            return None
        if layout.sharded and layout.memory is not None:
            return (layout.memory, layout.shape, layout.dtype)
        if len(layout.pieces) != 1:
            return None
        ((box, piece),) = layout.pieces
        memory = self._memory(piece)
        return None if memory is None else (memory, box, layout.shape)

    @staticmethod
    def _memory(value: object) -> Hashable | None:
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return None
        address = 0 if value.is_meta else value.data_ptr()
        if not address or not value.numel():
            return None
        return (
            value.get_device(),
            address,
            value.shape,
            value.stride(),
            value.dtype,
            value.is_conj(),
            value.is_neg(),
        )

    def global_shape(self, value: object) -> tuple[int, ...] | None:
        """Of a tensor that is in pieces on several ranks; None of one that is here as a whole."""
        if type(value) in _PLAIN:
            return None
        layout = self.layout(value)
        return layout.shape if layout is not None and layout.sharded else None

    def layout(self, value: object) -> Layout | None:
        """How this rank holds a tensor that torch's own class does not say all of.

        None where there is no saying: `_captured` asks again, and refuses it.
        """
        known = self._layouts.get(id(value))
        if known is None:
            try:
                known = value, layout_of(value)
            except ValueError:
                known = value, None
            self._layouts[id(value)] = known
        return known[1]

    def encode_atom(self, value: object) -> tuple[str, str] | None:
        """Torch's own scalars: dtype, device, memory format, Size."""
        if isinstance(value, torch.dtype):
            return "torch.dtype", str(value).removeprefix("torch.")
        if isinstance(value, torch.device):
            return "torch.device", str(value)
        if isinstance(value, torch.Size):
            return "torch.Size", ",".join(str(size) for size in value)
        return None

    def decode_atom(self, kind: str, text: str) -> object:
        """What `encode_atom` wrote.

        Raises:
            ValueError: it wrote no such thing.
        """
        if kind == "torch.dtype":
            dtype = getattr(torch, text, None)
            if isinstance(dtype, torch.dtype):
                return dtype
        elif kind == "torch.device":
            try:
                return torch.device(text)
            except RuntimeError as error:
                raise ValueError(str(error)) from error
        elif kind == "torch.Size":
            return torch.Size(int(size) for size in text.split(",") if size)
        raise ValueError(f"no {kind} is written {text[:40]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedTensor:
    """One leaf: what it is, and the tensor or array that holds it.

    Attributes:
        spec: its name, dtype and shape.
        value: live, or staged by this save; None where another rank writes it and its bytes were
            not kept.
        digest: of `replication.tensor_digest`, taken at the call; None where none was.
    """

    spec: TensorSpec
    value: torch.Tensor | np.ndarray | None
    digest: bytes | None = None

    def read(self) -> np.ndarray:
        """Its bytes, 1-D uint8, row-major; a view of the memory that holds it where possible.

        Raises:
            CkptError: they were not kept.
        """
        value = self._kept()
        if isinstance(value, torch.Tensor):
            return tensor_bytes(value)
        return np.ascontiguousarray(value).reshape(-1).view(np.uint8)

    def head(self, elements: int) -> np.ndarray:
        """The bytes of its first elements, as `read` gives them.

        Raises:
            CkptError: they were not kept.
        """
        value = self._kept().reshape(-1)[:elements]
        return CapturedTensor(spec=self.spec, value=value).read()

    def _kept(self) -> torch.Tensor | np.ndarray:
        if self.value is None:
            raise CkptError(
                what=f"the bytes of tensor {self.spec.name!r} were not kept: when the save was "
                "called, another rank was to write them",
                help="The state of another member of its group has changed; the next save knows",
                tensor=self.spec.name,
            )
        return self.value


class Document:
    """The text of a component's state document, made when it is first asked for."""

    __slots__ = ("_make", "_text")

    def __init__(self, component: StateComponent, make: Callable[[], bytes]) -> None:
        self._make = partial(_checked, component, make)
        self._text: bytes | None = None

    def text(self) -> bytes:
        """It. From any thread.

        Raises:
            UnsupportedStateError: it is too large.
        """
        if self._text is None:
            self._text = self._make()
        return self._text


def _checked(component: StateComponent, make: Callable[[], bytes]) -> bytes:
    text = make()
    if len(text) > MAX_STATE_BYTES:
        raise UnsupportedStateError(
            path=component.key,
            type_name=type(component.stateful).__name__,
            why=f"what is no tensor in it makes {len(text):,} bytes of JSON, "
            f"{MAX_STATE_BYTES:,} at most; hold long lists as arrays",
        )
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedComponent:
    """A component's state at one moment: its tree as a document, its tensors by name.

    Attributes:
        state: gives its document.
        config: the config.json of a Hugging Face model; empty for all else.
    """

    component: StateComponent
    state: Document
    tensors: Mapping[str, CapturedTensor]
    config: bytes = b""

    @property
    def document(self) -> bytes:
        """Its tree. Raises as `Document.text`."""
        return self.state.text()


def capture(component: StateComponent) -> CapturedComponent:
    """Ask a component for its state and take it apart. Nothing is copied.

    Raises:
        UnsupportedStateError: something in it has no pickle-free form, or it is too large.
        CkptError: its own code raised.
    """
    return capture_state(component, live_state(component))


def capture_state(component: StateComponent, state: object) -> CapturedComponent:
    """Take a state apart that a component gave. Raises UnsupportedStateError as `capture`."""
    tree = flatten(state, TorchAdapter(), root=component.key)
    held = [one for leaf in tree.leaves for one in _captured(component, leaf.name, leaf.value)]
    tensors = {one.spec.name: one for one in held}
    if len(tensors) < len(held):
        _refuse_names(component, [one.spec.name for one in held])
    document = Document(component, partial(dump_document, component.key, tree.document))
    document.text()  # a tree holds what is the trainer's
    return CapturedComponent(
        component=component, state=document, tensors=tensors, config=hf_config(component)
    )


def dump_document(key: str, tree: JsonValue) -> bytes:
    """The state document of a component."""
    return dump_json({"format_version": 1, "component": key, "tree": tree})


def hf_config(component: StateComponent) -> bytes:
    """The config.json of a Hugging Face model, so that the folder loads with from_pretrained."""
    to_json = getattr(getattr(component.stateful, "config", None), "to_json_string", None)
    if component.key != "model" or not callable(to_json):
        return b""
    return str(to_json()).encode()


def live_state(component: StateComponent) -> object:
    """The state as the trainer holds it.

    Raises:
        ConfigError: `stateful` is nothing that can be asked for it.
        CkptError: the trainer's own code raised; chained.
    """
    stateful = component.stateful
    try:
        if component.get_state is not None:
            return component.get_state()
        if isinstance(stateful, Stateful):
            return stateful.state_dict()
    except CkptError:
        raise
    except Exception as error:
        # The trainer's code may raise anything; the other ranks must hear of it by name.
        raise CkptError(
            what=f"component {component.key!r}: its state could not be read: "
            f"{type(error).__name__}: {error}",
            component=component.key,
        ) from error
    if isinstance(stateful, dict | list):
        return stateful
    raise ConfigError(
        field=f"StateComponent({component.key!r}).stateful",
        why=f"is a {type(stateful).__name__} without state_dict()",
        help="Pass something with state_dict/load_state_dict, a dict, a list, or get_state=",
    )


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's elements in row-major order, 1-D uint8 on the CPU; a view where possible."""
    data: np.ndarray = flat_bytes(tensor.cpu()).numpy()
    return data


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements in row-major order, 1-D uint8 on its own device."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not flat.numel():
        return torch.empty(0, dtype=torch.uint8, device=flat.device)
    # A single element counts as contiguous whatever its stride says; a view as bytes minds it.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)


def spec_of(component: str, name: str, value: torch.Tensor | np.ndarray) -> TensorSpec:
    """Name, dtype and shape of a leaf.

    Raises:
        UnsupportedStateError: a sparse, quantised, meta or sharded tensor.
    """
    if isinstance(value, np.ndarray):
        dtype = _numpy_dtype(f"{component}.{name}", value)
        return TensorSpec(name=name, dtype=dtype, shape=_numpy_shape(value))
    why = _refusal(value)
    if why:
        path = f"{component}.{name}"
        raise UnsupportedStateError(path=path, type_name=type(value).__name__, why=why)
    return _spec(name, DTYPE_NAMES[value.dtype], value.shape)


# The same tensors are captured in every save, and a spec is checked when it is made.
@lru_cache(maxsize=100_000)
def _spec(name: str, dtype: str, shape: torch.Size) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=tuple(shape))


def _captured(component: StateComponent, name: str, value: object) -> list[CapturedTensor]:
    """What this rank holds of a leaf, each piece an entry of its own (ADR 11)."""
    key = component.key
    if type(value) in _PLAIN or isinstance(value, np.ndarray):
        assert isinstance(value, torch.Tensor | np.ndarray), "one of these"
        return [CapturedTensor(spec=spec_of(key, name, value), value=value)]
    layout = layout_or_refuse(f"{key}.{name}", value)
    if not layout.sharded:
        return [CapturedTensor(spec=spec_of(key, name, t), value=t) for _, t in layout.pieces]
    if component.sharing_pattern not in _OF_PIECES:
        raise UnsupportedStateError(
            path=f"{key}.{name}",
            type_name=type(value).__name__,
            why=f"it is in pieces on several ranks, and the component is declared "
            f"{component.sharing_pattern.name}; declare it PER_GROUP or PER_RANK",
        )
    if not layout.shape:
        raise UnsupportedStateError(
            path=f"{key}.{name}",
            type_name=type(value).__name__,
            why="it has no dimensions, so it has no parts; hold it as a plain tensor",
        )
    return [
        CapturedTensor(spec=spec_of(key, piece_name(name, box), tensor), value=tensor)
        for box, tensor in layout.pieces
    ]


def _refuse_names(component: StateComponent, names: Sequence[str]) -> NoReturn:
    """The names of leaves differ, but one may be called as a piece of another is."""
    twice = next(name for at, name in enumerate(names) if name in names[:at])
    raise UnsupportedStateError(
        path=f"{component.key}.{twice}",
        type_name="tensor",
        why="a piece of a tensor on several ranks has this name; call the whole one otherwise",
    )


def layout_or_refuse(path: str, value: object) -> Layout:
    """How this rank holds a tensor.

    Raises:
        UnsupportedStateError: it is none, or in terms of a sum.
    """
    if not is_tensor(value):
        raise UnsupportedStateError(path=path, type_name=type(value).__name__)
    try:
        return layout_of(value)
    except ValueError as error:
        raise UnsupportedStateError(
            path=path, type_name=type(value).__name__, why=str(error)
        ) from error


def _refusal(tensor: torch.Tensor) -> str:
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; store its indices and values"
    if tensor.device.type == "meta":
        return "it has no data"
    if tensor.dtype not in DTYPE_NAMES:
        return f"{tensor.dtype} has no safetensors dtype"
    return ""


def _numpy_dtype(path: str, value: np.ndarray) -> str:
    code = {"f": "F", "i": "I", "u": "U", "c": "C"}.get(value.dtype.kind, "")
    bits = value.dtype.itemsize * (4 if value.dtype.kind == "c" else 8)
    if value.dtype.kind == "c":
        return {8: "C64", 16: "C128"}[value.dtype.itemsize]
    if value.dtype.kind == "b":
        return "BOOL"
    if code and bits in (8, 16, 32, 64):
        return f"{code}{bits}"
    raise UnsupportedStateError(path=path, type_name=f"numpy array of {value.dtype}")


def _numpy_shape(value: np.ndarray) -> tuple[int, ...]:
    return tuple(int(size) for size in value.shape)
