#!/usr/bin/env python3
"""Real training states to measure codecs on: a byte-level GPT, real text, AdamW.

    python benchmarks/traces.py [--quick] [--folder DIR] [--seed N]

The text is the standard library's own source, so nothing is downloaded. There are four traces:

- `fp32`: trained from scratch.
- `bf16`: the same with an fp32 master; the parameters are the master's cast, and what gradients are
  taken at.
- `finetune`: `fp32`'s last state, trained on other text with all but the last block frozen.
- `lora`: the same state, all frozen, with adapters of a low rank on every linear layer.

Of each, states are kept early, at a high learning rate, and late, when it has decayed: at a base
step of either phase and at `OFFSETS` after it. A state is one safetensors file; its tensors are
named `<class>.<parameter>`, by the classes `params`, `master`, `exp_avg` and `exp_avg_sq`. Frozen
parameters have no moments.

Traces are made once (minutes on one core, seconds with `--quick`) and kept in a folder named by a
hash of all that decides their bytes (settings, versions, this file's text). On one machine the same
settings give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    import numpy as np
    from numpy.typing import NDArray

OFFSETS = (0, 1, 10, 20, 30, 40, 50, 100)  # steps after a phase's base that are kept
GAPS = (1, 10, 100)
STAR_OFFSETS = (0, 10, 20, 30, 40, 50)  # evenly spaced saves, the first of them the anchor
PHASES = ("early", "late")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "common.py"
WEIGHT_DECAY, CLIP = 0.1, 1.0
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def _load_examples() -> ModuleType:
    """`examples/common.py` by its path: benchmarks have a module `common` of their own."""
    spec = importlib.util.spec_from_file_location("examples_common", EXAMPLES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


examples = _load_examples()


class Trace(StrEnum):
    """A way to train."""

    FP32 = "fp32"
    BF16 = "bf16"
    FINE_TUNE = "finetune"
    LORA = "lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long a trace trains, and how fast: a linear warm-up, then half a cosine to a twentieth.

    Attributes:
        early: the first phase's base step.
        late: the second's; training ends at its last offset.
    """

    early: int
    late: int
    warmup: int
    peak_rate: float

    def base(self, phase: str) -> int:
        """The base step of a phase."""
        return {"early": self.early, "late": self.late}[phase]

    def kept(self) -> frozenset[int]:
        """All steps whose state is kept."""
        return frozenset(base + offset for base in (self.early, self.late) for offset in OFFSETS)

    def rate(self, step: int) -> float:
        """The learning rate of a step; the first is 1."""
        if step <= self.warmup:
            return self.peak_rate * step / self.warmup
        done = (step - self.warmup) / (self.late + OFFSETS[-1] - self.warmup)
        return self.peak_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * done)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """All that decides the bytes of the traces; the defaults give 1.8 million parameters."""

    layers: int = 4
    width: int = 192
    heads: int = 4
    context: int = 64
    batch: int = 4
    rank: int = 8
    text_bytes: int = 4 << 20
    seed: int = 1
    pretraining: Schedule = Schedule(early=300, late=1300, warmup=50, peak_rate=1e-3)
    tuning: Schedule = Schedule(early=50, late=250, warmup=10, peak_rate=3e-4)

    @classmethod
    def quick(cls, seed: int = 1) -> TraceSettings:
        """A tiny model, trained in seconds."""
        return cls(
            layers=2,
            width=64,
            context=32,
            text_bytes=256 << 10,
            seed=seed,
            pretraining=Schedule(early=50, late=200, warmup=10, peak_rate=1e-3),
            tuning=Schedule(early=20, late=130, warmup=5, peak_rate=3e-4),
        )

    def schedule(self, trace: Trace) -> Schedule:
        """How a trace is trained."""
        return self.pretraining if trace in (Trace.FP32, Trace.BF16) else self.tuning

    def key(self) -> str:
        """A name for the traces: differs wherever their bytes may."""
        facts = [dataclasses.asdict(self), torch.__version__, platform.python_version()]
        hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for source in (Path(__file__), EXAMPLES):
            hashed.update(source.read_bytes())
        return hashed.hexdigest()[:16]


# --- reading --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorClass:
    """All tensors of one class in one state, one after another in the order of their names.

    Attributes:
        dtype: as safetensors names it.
        data: `[bytes]`.
    """

    dtype: str
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Traces:
    """Traces on disk."""

    folder: Path
    settings: TraceSettings

    def state(self, trace: Trace, phase: str, offset: int) -> dict[str, TensorClass]:
        """The state `offset` steps after the base of a phase, by class."""
        step = self.settings.schedule(trace).base(phase) + offset
        parts: dict[str, list[Tensor]] = {}
        with safe_open(_state_path(self.folder, trace, step), framework="pt") as file:
            for name in sorted(file.keys()):
                parts.setdefault(name.split(".", 1)[0], []).append(file.get_tensor(name).flatten())
        return {name: _joined(tensors) for name, tensors in sorted(parts.items())}


def _joined(tensors: Sequence[Tensor]) -> TensorClass:
    whole = torch.cat(list(tensors))
    return TensorClass(dtype=_SAFETENSORS_DTYPES[whole.dtype], data=whole.view(torch.uint8).numpy())


def _state_path(folder: Path, trace: Trace, step: int) -> Path:
    return folder / f"{trace}-{step:05}.safetensors"


# --- making ---------------------------------------------------------------------------------------


def default_folder() -> Path:
    """Where traces are kept unless told otherwise: outside of every repository."""
    return Path(tempfile.gettempdir()) / "ckptcoord-traces"


def make_traces(settings: TraceSettings, folder: Path | None = None) -> Traces:
    """The traces of these settings, made now unless the folder has them."""
    parent = folder or default_folder()
    wanted = parent / settings.key()
    if not wanted.exists():
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent) as name:
            made = Path(name) / "traces"
            made.mkdir()
            _train_all(settings, made)
            if not wanted.exists():  # another process may have been faster
                shutil.move(made, wanted)
    return Traces(folder=wanted, settings=settings)


def _train_all(settings: TraceSettings, folder: Path) -> None:
    text = examples.standard_library_text(2 * settings.text_bytes)
    before, after = text[: len(text) // 2], text[len(text) // 2 :]
    with _one_thread():
        model = _new_model(settings)
        _train(Trace.FP32, model, settings, before, folder)
        trained = {name: value.clone() for name, value in model.state_dict().items()}
        _train(Trace.BF16, _new_model(settings), settings, before, folder)
        for trace in (Trace.FINE_TUNE, Trace.LORA):
            model = _new_model(settings)
            model.load_state_dict(trained)
            (_freeze if trace is Trace.FINE_TUNE else _adapt)(model, settings)
            _train(trace, model, settings, after, folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The number of threads decides the order of sums, and so the bytes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _new_model(settings: TraceSettings) -> nn.Module:
    torch.manual_seed(settings.seed)
    config = examples.GPTConfig(
        layers=settings.layers,
        width=settings.width,
        heads=settings.heads,
        context=settings.context,
        dropout=0.0,
    )
    model: nn.Module = examples.ByteGPT(config)
    return model


def _freeze(model: nn.Module, settings: TraceSettings) -> None:
    """Leave the last block and the last norm to be trained."""
    trained = (f"blocks.{settings.layers - 1}.", "norm.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


class _Adapted(nn.Module):
    """A frozen linear layer and a trained product of two narrow matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, hidden: Tensor) -> Tensor:
        adapted: Tensor = self.base(hidden) + hidden @ self.a.T @ self.b.T
        return adapted


def _adapt(model: nn.Module, settings: TraceSettings) -> None:
    """Freeze all, and adapt every linear layer of the blocks."""
    model.requires_grad_(requires_grad=False)
    linears = [
        (block, name, child)
        for block in model.get_submodule("blocks").children()
        for name, child in block.named_children()
        if isinstance(child, nn.Linear)
    ]
    for block, name, child in linears:
        setattr(block, name, _Adapted(child, settings.rank))


def _train(
    trace: Trace, model: nn.Module, settings: TraceSettings, text: bytes, folder: Path
) -> None:
    """Train to the end of the schedule, and keep its states on the way."""
    schedule = settings.schedule(trace)
    run = _Run(trace, model)
    windows = examples.ByteWindows(text, settings.context)
    generator = torch.Generator().manual_seed(settings.seed)
    for step in range(1, max(schedule.kept()) + 1):
        chosen = torch.randint(len(windows), (settings.batch,), generator=generator)
        batch = [windows[int(index)] for index in chosen]
        run.step(
            torch.stack([one["input_ids"] for one in batch]),
            torch.stack([one["labels"] for one in batch]),
            schedule.rate(step),
        )
        if step in schedule.kept():
            save_file(run.state(), _state_path(folder, trace, step))


class _Run:
    """A model in training.

    The parameters of `bf16` are held, and computed with, as fp32 that bf16 can express: a CPU
    multiplies them far faster, and their bytes are the same.
    """

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self._model = model
        self._rounded = trace is Trace.BF16
        self._params = dict(model.named_parameters())
        self._trained = {name: one for name, one in self._params.items() if one.requires_grad}
        self._master = self._trained
        if self._rounded:
            self._master = {
                n: nn.Parameter(one.detach().clone()) for n, one in self._params.items()
            }
            self._round()
        self._optimizer = torch.optim.AdamW(
            self._master.values(), weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, tokens: Tensor, labels: Tensor, rate: float) -> None:
        """One step on `[batch, time]` tokens and their successors."""
        self._model.zero_grad()
        self._model(tokens, labels)["loss"].backward()
        nn.utils.clip_grad_norm_(self._trained.values(), CLIP)
        for name, parameter in self._trained.items():
            self._master[name].grad = parameter.grad
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.step()
        if self._rounded:
            self._round()

    def state(self) -> dict[str, Tensor]:
        """A checkpoint's tensors, by `<class>.<parameter>`."""
        dtype = torch.bfloat16 if self._rounded else torch.float32
        tensors = {f"params.{n}": one.detach().to(dtype) for n, one in self._params.items()}
        for name, parameter in self._master.items():
            if self._rounded:
                tensors[f"master.{name}"] = parameter.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self._optimizer.state[parameter][moment]
        return tensors

    @torch.no_grad()
    def _round(self) -> None:
        for name, parameter in self._params.items():
            parameter.copy_(self._master[name].to(torch.bfloat16))


def main() -> None:
    """Make the traces, and say where they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="of a tiny model, in seconds")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where to keep them")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    settings = TraceSettings.quick(args.seed) if args.quick else TraceSettings(seed=args.seed)
    began_s = time.perf_counter()
    traces = make_traces(settings, args.folder)
    print(f"{traces.folder}: {time.perf_counter() - began_s:.1f} s")


if __name__ == "__main__":
    main()
