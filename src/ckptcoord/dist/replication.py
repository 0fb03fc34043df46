"""Are the replicas the same? Fixed-size digests first; who, where and how far apart only on demand.

In steady state each rank says 16 bytes a component. When these differ, three more rounds narrow it
down: digests of each tensor, digests of the blocks of the first tensor that differs, and the
values of at most four blocks.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import numpy as np
import torch
import xxhash
from blake3 import blake3

from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.core.sharing import SharingPattern, ValidationLevel
from ckptcoord.dist.capture import CapturedComponent, CapturedTensor, flat_bytes, tensor_bytes
from ckptcoord.dist.devicesums import device_checksum
from ckptcoord.dist.distance import describe_distance, first_difference
from ckptcoord.dist.messages import as_dict, as_int, as_list
from ckptcoord.dist.session import heard
from ckptcoord.errors import ReplicationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ckptcoord.dist.deadline import Deadline
    from ckptcoord.dist.world import World

_DIGEST_BYTES = 16
_STATE = "<state>"  # stands for everything in a component that is no tensor
_SAMPLE_BYTES = 64
_SAMPLES = 64
_BLOCKS = 4096
_MIN_BLOCK_BYTES = 4096
_SHOWN_BLOCKS = 4
_SHOWN_BYTES = 64 << 10
_SHOWN_STATE_BYTES = 256 << 10


def structure_digest(captured: CapturedComponent) -> str:
    """Names, shapes and dtypes: what placement depends on. Hex."""
    facts: JsonValue = [
        [t.spec.name, t.spec.dtype, list(t.spec.shape)] for t in captured.tensors.values()
    ]
    return blake3(dump_json(facts)).hexdigest(length=_DIGEST_BYTES)


def document_digest(captured: CapturedComponent) -> str:
    """What it holds that is no tensor. Hex; empty where no other rank's could differ in names."""
    if captured.component.sharing_pattern is not SharingPattern.PER_GROUP:
        return ""
    return blake3(captured.document).hexdigest(length=_DIGEST_BYTES)


def content_digest(captured: CapturedComponent, level: ValidationLevel) -> str:
    """All that a level compares, in one digest; empty for NONE. Hex."""
    if level is ValidationLevel.NONE:
        return ""
    hasher = blake3(captured.document)
    for tensor in captured.tensors.values():
        hasher.update(tensor_digest(tensor, level))
    return hasher.hexdigest(length=_DIGEST_BYTES)


def tensor_digest(captured: CapturedTensor, level: ValidationLevel) -> bytes:
    """16 bytes that stand for a tensor's content at a level, computed where the tensor lives.

    Where it was taken at the call already, it is that.
    """
    if captured.digest is not None:
        return captured.digest
    match level:
        case ValidationLevel.NONE:
            return bytes(_DIGEST_BYTES)
        case ValidationLevel.QUICK:
            return xxhash.xxh3_128_digest(_sample(captured))
        case ValidationLevel.TENSOR:
            value = captured.value
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                return device_checksum(value)
            return xxhash.xxh3_128_digest(captured.read().data)
        case ValidationLevel.FULL:
            return blake3(captured.read().data, max_threads=blake3.AUTO).digest(_DIGEST_BYTES)
        case _:
            assert_never(level)


def sample_offsets(length_bytes: int) -> np.ndarray:
    """The byte offsets that QUICK looks at: all of a small tensor, else 64 runs of 64 bytes."""
    if length_bytes <= _SAMPLE_BYTES * _SAMPLES:
        return np.arange(length_bytes, dtype=np.int64)
    starts = np.linspace(0, length_bytes - _SAMPLE_BYTES, _SAMPLES).astype(np.int64)
    return (starts[:, None] + np.arange(_SAMPLE_BYTES, dtype=np.int64)).reshape(-1)


def _sample(captured: CapturedTensor) -> bytes:
    value = captured.value
    if not isinstance(value, torch.Tensor) or value.device.type == "cpu":
        data = captured.read()
        sample: bytes = data[sample_offsets(data.size)].tobytes()
        return sample
    flat = flat_bytes(value)
    offsets = torch.from_numpy(sample_offsets(flat.numel())).to(value.device)
    return tensor_bytes(flat.index_select(0, offsets)).tobytes()


# --- who differs, and by how much ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Replicas of one component that differ, as rank 0 found from the digests."""

    component: str
    members: tuple[int, ...]

    def to_json(self) -> JsonValue:
        """For the message that starts the search."""
        return {"component": self.component, "members": list(self.members)}

    @classmethod
    def from_json(cls, value: JsonValue) -> Divergence:
        """What `to_json` wrote."""
        document = as_dict(value)
        return cls(
            component=str(document["component"]),
            members=tuple(as_int(rank) for rank in as_list(document["members"])),
        )


def raise_divergence(
    world: World,
    divergence: Divergence,
    captured: CapturedComponent | None,
    level: ValidationLevel,
    deadline: Deadline,
) -> None:
    """Find out what differs and raise it, on every rank.

    Raises:
        ReplicationError: names the component, the tensor, the ranks in the minority and how far
            apart the values are.
    """
    held = captured if world.rank in divergence.members else None
    found = as_dict(
        world.agree(
            "divergence",
            None if held is None else heard(lambda: _inventory(held, level)),
            lambda said: _find_tensor(divergence, said),
            deadline=deadline,
        )
    )
    name, ranks = str(found["tensor"]), {as_int(rank) for rank in as_list(found["ask"])}
    asked = held if held is not None and world.rank in ranks else None
    blocks = as_dict(
        world.agree(
            "divergence: blocks",
            None if asked is None else heard(lambda: _block_digests(asked, name)),
            lambda said: _find_blocks(found, said),
            deadline=deadline,
        )
    )
    world.agree(
        "divergence: values",
        None if asked is None else heard(lambda: _block_values(asked, name, blocks)),
        lambda said: _conclude(divergence, found, said),
        deadline=deadline,
    )


def _inventory(captured: CapturedComponent, level: ValidationLevel) -> JsonValue:
    facts: dict[str, JsonValue] = {
        _STATE: blake3(captured.document).hexdigest(length=_DIGEST_BYTES)
    }
    for name, tensor in captured.tensors.items():
        digest = tensor_digest(tensor, level).hex()
        facts[name] = f"{tensor.spec.dtype}{list(tensor.spec.shape)} {digest}"
    return facts


def _find_tensor(divergence: Divergence, said: Sequence[JsonValue]) -> JsonValue:
    """The first name that is not the same on all members; the state document comes last."""
    facts = {rank: as_dict(said[rank]) for rank in divergence.members}
    names = sorted({name for one in facts.values() for name in one}, key=lambda n: (n == _STATE, n))
    for name in names:
        kinds: dict[JsonValue, list[int]] = {}
        for rank, one in facts.items():
            kinds.setdefault(str(one.get(name, "absent")), []).append(rank)
        if len(kinds) > 1:
            return _verdict(name, kinds)
    # The digests differed a moment ago: the state moved between the two looks.
    raise ReplicationError(
        component=divergence.component,
        tensor="(unknown)",
        minority=divergence.members[1:],
        reference=divergence.members[0],
        apart="the state changed while it was being compared",
    )


def _verdict(name: str, kinds: dict[JsonValue, list[int]]) -> JsonValue:
    """The majority is right; of equal camps the one with the lowest rank is."""
    camps = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[1][0]))
    reference, minority = camps[0][1][0], sorted(r for _, ranks in camps[1:] for r in ranks)
    shapes = {str(kind).rpartition(" ")[0] for kind, _ in camps}
    comparable = name == _STATE or (len(shapes) == 1 and "absent" not in {k for k, _ in camps})
    apart = "" if comparable else f"{_shape_of(camps[1][0])} against {_shape_of(camps[0][0])}"
    return {
        "tensor": name,
        "reference": reference,
        "minority": list(minority),
        "apart": apart,
        "ask": [reference, minority[0]] if comparable else [],
    }


def _shape_of(kind: JsonValue) -> str:
    return "absent" if kind == "absent" else str(kind).rpartition(" ")[0]


def _block_bytes(length_bytes: int) -> int:
    """A block size that is a multiple of every element size and gives at most 4096 blocks."""
    return max(_MIN_BLOCK_BYTES, -(-length_bytes // (_BLOCKS * 16)) * 16)


def _blocks_of(data: np.ndarray) -> Iterable[np.ndarray]:
    size = _block_bytes(data.size)
    return (data[start : start + size] for start in range(0, data.size, size))


def _block_digests(captured: CapturedComponent, name: str) -> JsonValue:
    tensor = None if name == _STATE else captured.tensors[name]
    if tensor is None or tensor.value is None:
        return ""
    data = tensor.read()
    return "".join(xxhash.xxh3_64_hexdigest(block.data) for block in _blocks_of(data))


def _find_blocks(found: dict[str, JsonValue], said: Sequence[JsonValue]) -> JsonValue:
    asked = [as_int(rank) for rank in as_list(found["ask"])]
    if len(asked) < 2:
        return {"blocks": [], "differing": 0, "total": 0}
    digests = [str(said[rank]) for rank in asked]
    if not all(digests):  # the state document, or bytes that were not kept
        return {"blocks": [], "differing": 0, "total": 0}
    total = len(digests[0]) // 16
    differing: list[JsonValue] = [
        i for i in range(total) if len({d[16 * i : 16 * i + 16] for d in digests}) > 1
    ]
    found["differing"], found["total"] = len(differing), total
    return {"blocks": differing[:_SHOWN_BLOCKS]}


def _block_values(
    captured: CapturedComponent, name: str, blocks: dict[str, JsonValue]
) -> JsonValue:
    if name == _STATE:
        shown = captured.document if len(captured.document) <= _SHOWN_STATE_BYTES else b""
        return {"state": base64.b64encode(shown).decode()}
    tensor = captured.tensors[name]
    if tensor.value is None:
        return {"dtype": tensor.spec.dtype, "values": ""}
    data = tensor.read()
    size = _block_bytes(data.size)
    parts = [
        data[i * size : (i + 1) * size][:_SHOWN_BYTES]
        for i in (as_int(block) for block in as_list(blocks["blocks"]))
    ]
    joined = np.concatenate(parts).tobytes() if parts else b""
    return {"dtype": tensor.spec.dtype, "values": base64.b64encode(joined).decode()}


def _conclude(
    divergence: Divergence, found: dict[str, JsonValue], said: Sequence[JsonValue]
) -> JsonValue:
    asked = [as_int(rank) for rank in as_list(found["ask"])]
    name, apart = str(found["tensor"]), str(found["apart"])
    if asked:
        left, right = (as_dict(said[rank]) for rank in asked)
        if name == _STATE:
            name, apart = _state_apart(left, right)
        elif not found.get("total"):
            apart = "their digests differ; a save that waits measures by how much"
        else:
            apart = describe_distance(
                base64.b64decode(str(left["values"])),
                base64.b64decode(str(right["values"])),
                str(left["dtype"]),
            )
            apart += f"; {found['differing']} of {found['total']} blocks differ"
    raise ReplicationError(
        component=divergence.component,
        tensor=name,
        minority=tuple(as_int(rank) for rank in as_list(found["minority"])),
        reference=as_int(found["reference"]),
        apart=apart,
    )


def _state_apart(left: dict[str, JsonValue], right: dict[str, JsonValue]) -> tuple[str, str]:
    documents = [base64.b64decode(str(side["state"])) for side in (left, right)]
    if not all(documents):
        return _STATE, "the values that are no tensors differ"
    trees = [as_dict(parse_json(data, path="replica's state"))["tree"] for data in documents]
    return first_difference(trees[0], trees[1])
