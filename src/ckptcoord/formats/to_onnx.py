"""A model as an ONNX graph. The graph comes from the user's own module, the weights from here."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from ckptcoord.dist.capture import TORCH_DTYPES, tensor_bytes
from ckptcoord.errors import CkptError, ConfigError, CorruptError, DigestMismatchError

if TYPE_CHECKING:
    from pathlib import Path

    from ckptcoord.formats.spilled import Spilled

_EXTRA = "Run `pip install 'ckptcoord[onnx]'`"
_FIELD = "--model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Factory:
    """What makes the module.

    Attributes:
        name: `package.module:function`. The function takes nothing and gives the module and its
            example inputs, a tuple or a dict; or a module that has them as `dummy_inputs`, as those
            of transformers do.
    """

    name: str

    def make(self) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The module, and what it is called with.

        Raises:
            ConfigError: it cannot be imported, fails, or gives something else.
        """
        where, colon, what = self.name.partition(":")
        if not colon or not all(part.isidentifier() for part in [*where.split("."), what]):
            why = f"{self.name[:80]!r} is not package.module:function"
            raise ConfigError(field=_FIELD, why=why)
        try:
            made = getattr(import_module(where), what)()
        except (Exception, SystemExit) as error:
            why = f"{self.name} failed: {type(error).__name__}: {error}"
            raise ConfigError(field=_FIELD, why=why) from error
        module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if isinstance(module, torch.nn.Module) and inputs is None:
            inputs = getattr(module, "dummy_inputs", None)
        if not isinstance(module, torch.nn.Module) or not isinstance(inputs, tuple | Mapping):
            raise ConfigError(
                field=_FIELD,
                why=f"{self.name} gives no module with example inputs",
                help="Return (module, (input, ...)) or (module, {'name': input})",
            )
        if isinstance(inputs, Mapping):
            return module, (), dict(inputs)
        return module, inputs, {}


def check_onnx() -> None:
    """See that the packages are there, before anything is read.

    Raises:
        ConfigError: they are not.
    """
    for name in ("onnx", "onnxscript"):
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                field="--to", why=f"onnx needs {name}, which is not installed", help=_EXTRA
            ) from error


def write_onnx(spilled: Spilled, path: Path, factory: Factory, *, dtype: str | None) -> None:
    """Write a new file, its weights in another one beside it, and read both back.

    The whole module is in memory.

    Raises:
        ConfigError: the module cannot be made or exported, or its weights are others.
        CorruptError: what was read back is not the checkpoint's.
    """
    module, args, kwargs = factory.make()
    if dtype is not None:
        module = module.to(TORCH_DTYPES[dtype])
        args, kwargs = _cast(args, dtype), _cast(kwargs, dtype)
    try:
        module.load_state_dict(spilled.state)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        why = f"{factory.name} is not the model of this checkpoint: {error}"
        raise ConfigError(field=_FIELD, why=why[:2000]) from error
    module.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch deprecates in itself
            # Not optimised: what would be folded or transposed could not be compared.
            torch.onnx.export(
                module,
                args,
                path,
                kwargs=kwargs or None,
                dynamo=True,
                external_data=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise CkptError(
            what=f"torch.onnx cannot export {factory.name}: {type(error).__name__}: "
            f"{str(error)[:1000]}",
            help="Nothing was written. Its own report: `torch.onnx.export(..., report=True)`",
        ) from error
    _check(module.state_dict(), path)


def _cast(value: Any, dtype: str) -> Any:  # noqa: ANN401 (inputs may be anything)
    """Inputs with their floating-point tensors in a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(TORCH_DTYPES[dtype]) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _check(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """The graph is sound, and its weights are the state's, byte for byte."""
    onnx = import_module("onnx")
    onnx.checker.check_model(str(path))
    tensors = {one.name: one for one in onnx.load(str(path)).graph.initializer}
    weights = {name: one for name, one in state.items() if name in tensors}
    if state and not weights:
        raise CorruptError(path=path.name, why="has none of the model's weights by name")
    for name, weight in weights.items():
        if tensors[name].raw_data != tensor_bytes(weight).tobytes() or sys.byteorder != "little":
            raise DigestMismatchError(
                path=path.name, tensor=name, expected="the checkpoint's", found="other bytes"
            )
