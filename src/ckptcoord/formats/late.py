"""Tensors that are read from a source each time they are used, and held by nobody in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class LateTensor(torch.Tensor):
    """A tensor without memory: dtype and shape, and where its elements are to be had.

    Any operation on it is one on what `read` gives then. So a state of them takes no more memory
    than those of its tensors that are in use.

    Args:
        read: gives the tensor; called from any thread.
        dtype: which it has.
        shape: likewise.
    """

    # torch documents it so; its stubs do not know.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # noqa: SLF001
    _read: Callable[[], torch.Tensor]

    def __new__(
        cls, read: Callable[[], torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Self:
        """One that does not require a gradient."""
        # As torch's page on extending tells; they differ from others in having no storage.
        self: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # noqa: SLF001
        self._read = read
        return self

    def __init__(self, *_: object) -> None:
        """All is done in `__new__`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 (whatever the operation gives)
        """Do an operation on what was read."""
        given = {key: _here(value) for key, value in (kwargs or {}).items()}
        return func(*map(_here, args), **given)

    def __repr__(self) -> str:  # type: ignore[override]
        """Without its elements."""
        return f"LateTensor({self.dtype}, {list(self.shape)})"


def _here(value: object) -> object:
    if isinstance(value, LateTensor):
        return value._read()  # noqa: SLF001 (its own)
    if isinstance(value, list | tuple):
        return type(value)(map(_here, value))
    return value
