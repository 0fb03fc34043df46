"""The random number generators of one rank, as a component."""

from __future__ import annotations

import random
import warnings
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ckptcoord.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# What else is seeded from has fewer numbers than (seed, this, step, rank): (seed, rank) at the
# start, (seed, epoch, index) of a sample.
_NEW_RANK = int.from_bytes(b"new rank", "big")


class RNGState:
    """Python's, numpy's (legacy global) and torch's generators, the CPU's and every CUDA device's.

    It holds nothing itself: the state is read from, and put back into, the live generators, bit
    for bit. CUDA states exist only once CUDA has been initialised. numpy's newer `Generator`
    objects belong to whoever made them: declare them as components of their own.

    **Another number of ranks.** Declared PER_RANK with `on_world_size_change="own"`, ranks that
    there were go on exactly, and new ones begin by `derive_state`.

    Args:
        seed: the run's, for `derive_state`; None: what torch's generator was last seeded with.
    """

    # The load applies this component after all others, whose own loading may draw numbers.
    restore_last: ClassVar[bool] = True

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def state_dict(self) -> dict[str, Any]:
        """The state of every generator, as copies."""
        version, words, gauss = random.getstate()
        return {
            "python": {
                "version": version,
                "words": np.array(words, dtype=np.uint32),
                "gauss": gauss,
            },
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": _cuda_states(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        States of CUDA devices that this process does not have are left out, with a warning.

        Raises:
            ConfigError: numpy's global generator is of another kind than the saved one.
        """
        python, numbers = state_dict["python"], state_dict["numpy"]
        _load_numpy(numbers)
        words = tuple(int(word) for word in np.asarray(python["words"]))
        random.setstate((int(python["version"]), words, python["gauss"]))
        torch.set_rng_state(_bytes(state_dict["torch"]))
        _load_cuda(state_dict["cuda"])

    def derive_state(self, step: int, rank: int) -> None:
        """Seed every generator of a rank that the saved run did not have.

        From (seed, step, rank): the same checkpoint on the same number of ranks goes on alike each
        time, and nothing else draws these numbers, be it a run's start or another step or rank.
        """
        seed = torch.initial_seed() if self.seed is None else self.seed
        seed_everything(seed, _NEW_RANK, step, rank)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace: every generator is put back at the end."""
    rng = RNGState()
    before = rng.state_dict()
    try:
        yield
    finally:
        rng.load_state_dict(before)


def seed_everything(seed: int, *path: int) -> None:
    """Seed every generator that `RNGState` covers.

    Args:
        seed: the run's seed, 0 or more.
        path: numbers that tell apart who draws, for instance the rank.
    """
    mixed = mix_seed(seed, *path)
    random.seed(mixed)
    np.random.seed(mixed & 0xFFFF_FFFF)
    torch.manual_seed(mixed)


def mix_seed(*numbers: int) -> int:
    """One 63-bit seed from several numbers; other numbers give an unrelated one.

    A hash, since numpy's SeedSequence takes (7,) and (7, 0) for the same.
    """
    digest = blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _bytes(state: object) -> torch.Tensor:
    """A generator's state wherever the load has put it, as torch wants it: a CPU byte tensor."""
    return torch.as_tensor(state, dtype=torch.uint8, device="cpu")


def _load_numpy(state: dict[str, Any]) -> None:
    kind = np.random.get_state(legacy=False)["bit_generator"]
    if kind != state["bit_generator"]:
        raise ConfigError(
            field="RNGState",
            why=f"numpy's global generator is a {kind}, the saved one a {state['bit_generator']}",
            help="Call numpy.random.set_bit_generator as the saved run did",
        )
    inner = {
        name: np.asarray(value) if isinstance(value, torch.Tensor) else value
        for name, value in state["state"].items()
    }
    np.random.set_state({**state, "state": inner})


def _cuda_states() -> list[torch.Tensor]:
    ready = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return list(torch.cuda.get_rng_state_all()) if ready else []


def _load_cuda(states: Sequence[object]) -> None:
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device, state in enumerate(states[:present]):
        torch.cuda.set_rng_state(_bytes(state), device)
    if len(states) > present:
        warnings.warn(
            f"{len(states)} CUDA generators were saved and this process has {present} devices: "
            "what is drawn on the GPU will differ from the saved run",
            stacklevel=2,
        )
