#!/usr/bin/env python3
"""What agreement costs: the planner and the manifest for 10,000 ranks and 100,000 tensors.

Nothing is written and no process is started: the ranks are simulated, and what is timed is the
real code of every rank (placement) and of rank 0 (votes, manifest). `torch.distributed.checkpoint`
plans the same tensors beside it, for a smaller world, in the same run.

    python benchmarks/coordination.py [--quick] [--json]

Seconds are of CPU time; all is done in one thread. The bar, 2 s and 500 MB, is on the planning of
every copy and on building and writing the manifest; taking the votes apart and reading the manifest
back are shown beside it. The memory is that of all ranks together: this process is all of them.

Ratios (less is better): `seconds_of_bar` and `memory_of_bar` are against 2 s and 500 MB;
`time_of_dcp` and `bytes_of_dcp` are rank 0's time (with the votes) and what it receives, against
DCP's. What a rank sends in the first round is a constant here, 350 bytes a component: its
declarations and two digests; what it votes with is the real message.
"""

from __future__ import annotations

import gc
import hashlib
import pickle  # to weigh what DCP's ranks send
import resource
import statistics
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

from common import emit, options, ratio

from ckptcoord.core.digest import Digest
from ckptcoord.core.jsonio import dump_json, parse_json
from ckptcoord.core.manifest import CheckpointManifest, FileKind, FileRecord
from ckptcoord.core.refs import CheckpointId
from ckptcoord.core.sharing import ComponentSpec, SharingPattern, ValidationLevel
from ckptcoord.core.topology import GroupLayout, Scope, Topology
from ckptcoord.plan.placement import (
    Piece,
    ShardPlan,
    index_path,
    plan_shards,
    scopes_of,
    state_path,
)
from ckptcoord.repo.manifests import Declared, Lineage, ManifestFacts, Written, build_manifest

BAR_S = 2.0
BAR_BYTES = 500_000_000
NODE_RANKS = 8
MAX_SHARD_SIZE = 5_000_000_000
# What a rank sends in the round "open": step, branch, its declarations and two digests a component.
OPEN_BYTES_A_COMPONENT = 350
DCP_TENSORS = 600
READ_VOTES = "read all votes"
READ_BACK = "read the manifest back"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A simulated job: how many tensors each copy of each component has."""

    topology: Topology
    tensors: dict[ComponentSpec, int]

    def total_tensors(self) -> int:
        """Over all copies."""
        return sum(n * len(scopes_of(s, self.topology)) for s, n in self.tensors.items())


@dataclass(slots=True, kw_only=True)
class Figures:
    """One run."""

    seconds: dict[str, float] = field(default_factory=dict)
    files: int = 0
    vote_bytes: int = 0
    manifest_bytes: int = 0

    @property
    def planner_and_manifest_s(self) -> float:
        """What the bar is about: without the votes, and without reading back."""
        apart = (READ_VOTES, READ_BACK)
        return sum(seconds for phase, seconds in self.seconds.items() if phase not in apart)

    def clock(self, phase: str, since: float) -> float:
        """Book the time since then; returns now."""
        now = time.process_time()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - since
        return now


def large_job(world_size: int, tensors: int) -> Job:
    """Three quarters of the tensors are a replicated model and Adam's two moments of it."""
    ranks = range(world_size)
    groups = tuple(tuple(ranks[at : at + NODE_RANKS]) for at in range(0, world_size, NODE_RANKS))
    spec = ComponentSpec
    per_group = max(1, (tensors - tensors * 3 // 4 - world_size) // len(groups))
    return Job(
        topology=Topology(nodes=groups, groups=(GroupLayout(name="tp", instances=groups),)),
        tensors={
            spec(key="model", pattern=SharingPattern.REPLICATED): tensors // 4,
            spec(key="optimizer", pattern=SharingPattern.REPLICATED): tensors // 2,
            spec(key="rng", pattern=SharingPattern.PER_RANK): 1,
            spec(key="dataset", pattern=SharingPattern.PER_RANK): 0,
            spec(key="experts", pattern=SharingPattern.PER_GROUP, group_name="tp"): per_group,
            spec(key="cache", pattern=SharingPattern.PER_NODE): 0,
            spec(key="progress", pattern=SharingPattern.GLOBAL): 0,
        },
    )


def pieces_of(count: int, scope: Scope) -> list[Piece]:
    """Tensors of 4 KB to 64 MB, as layers have them."""
    sizes = (64_000_000, 16_000_000, 16_000_000, 4_000, 4_000, 1_000_000)
    return [
        Piece(
            name=f"h.{at // len(sizes)}.{at % len(sizes)}.weight",
            nbytes=sizes[at % len(sizes)],
            holders=scope.writers,
        )
        for at in range(count)
    ]


def records_of(spec: ComponentSpec, scope: Scope, plans: tuple[ShardPlan, ...]) -> list[Written]:
    """What the writers of a copy would report: its shards, its index, its state documents."""
    files = [(plan.path, plan.nbytes, plan.writer, FileKind.TENSORS) for plan in plans]
    if len(plans) > 1:
        files.append((index_path(spec.key, scope), 5_000, scope.writers[0], FileKind.INDEX))
    own = spec.pattern is SharingPattern.PER_GROUP
    for member in scope.writers if own else scope.writers[:1]:
        path = state_path(spec.key, scope, member if own else None)
        files.append((path, 900, member, FileKind.STATE))
    return [
        Written(
            record=FileRecord(
                path=path,
                size_bytes=size,
                digest=Digest(hashlib.sha256(path.encode()).digest()),  # any 32 bytes will do
                component=spec.key,
                scope=scope.label,
                writer_rank=writer,
                kind=kind,
            ),
            logical_bytes=size,
        )
        for path, size, writer, kind in files
    ]


def one_run(job: Job) -> Figures:
    """Plan every copy, take every rank's vote, make the manifest, write it and read it back."""
    figures = Figures()
    sent = _votes(job, figures)
    _settle()
    began = time.process_time()
    files = [
        Written.from_json(value, writer_rank=rank)
        for rank, one in enumerate(sent)
        for value in _as_list(parse_json(one, path="vote"))
    ]
    began = figures.clock(READ_VOTES, began)
    manifest = build_manifest(_facts(job), files)
    began = figures.clock("build the manifest", began)
    data = manifest.to_bytes()
    began = figures.clock("write the manifest", began)
    again = CheckpointManifest.parse(data, path="m")
    figures.clock(READ_BACK, began)
    if again != manifest:
        sys.exit("the manifest did not come back as it was written")
    figures.files = len(manifest.files)
    figures.manifest_bytes = len(data)
    figures.vote_bytes = sum(len(one) for one in sent)
    return figures


def _votes(job: Job, figures: Figures) -> list[bytes]:
    """What every rank sends once it has planned its share."""
    copies = [
        (spec, scope, pieces_of(count, scope))
        for spec, count in job.tensors.items()
        for scope in scopes_of(spec, job.topology)
    ]
    loads: dict[tuple[int, ...], dict[int, int]] = {}
    _settle()
    began = time.process_time()
    plans = [
        plan_shards(
            spec.key,
            scope,
            pieces,
            max_shard_size=MAX_SHARD_SIZE,
            loads=loads.setdefault(scope.writers, {}),
        )
        for spec, scope, pieces in copies
    ]
    figures.clock("plan all copies", began)
    votes: dict[int, list[Written]] = {rank: [] for rank in range(job.topology.world_size)}
    for (spec, scope, _), planned in zip(copies, plans, strict=True):
        for written in records_of(spec, scope, planned):
            votes[written.record.writer_rank].append(written)
    return [dump_json([written.to_json() for written in vote]) for vote in votes.values()]


def _settle() -> None:
    """Keep Python's collector off what, in a real job, is on 10,000 other machines."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def _as_list(value: object) -> list[object]:
    if not isinstance(value, list):
        sys.exit("a vote is not a list")
    return value


def _facts(job: Job) -> ManifestFacts:
    return ManifestFacts(
        checkpoint_id=CheckpointId.parse("checkpoint-500"),
        parent=CheckpointId.parse("checkpoint-400"),
        lineage=Lineage(reason="compression is off"),
        attempt="0" * 32,
        epoch=1.0,
        topology=job.topology,
        timestamp=datetime(2026, 1, 1, tzinfo=UTC),
        components=[
            Declared(spec=spec, validation=ValidationLevel.TENSOR, required=True)
            for spec in job.tensors
        ],
        metrics={"loss": 2.5},
        message="",
        training_args_hash=None,
        ckptcoord_version="0.1.0",
        pytorch_version="2.13.0",
    )


# --- the other side -------------------------------------------------------------------------------


def beside_dcp(world_size: int, count: int) -> list[tuple[float, float, int, int]]:
    """Rank 0's seconds, ours and DCP's, and the bytes that it receives, ours and DCP's, by run.

    Both plan 600 replicated tensors. For DCP: the local plans of all ranks, each pickled as its
    gather does, and the coordinator's global plan. For us: the plan, all votes and the manifest.
    """
    import torch
    from torch.distributed.checkpoint import DefaultSavePlanner

    spec = ComponentSpec(key="model", pattern=SharingPattern.REPLICATED)
    job = Job(topology=Topology.single_node(world_size), tensors={spec: DCP_TENSORS})
    state = {f"h.{at}.weight": torch.empty(1) for at in range(DCP_TENSORS)}
    sent = []
    for rank in range(world_size):
        planner = DefaultSavePlanner()
        planner.set_up_planner(state, is_coordinator=rank == 0)
        sent.append(pickle.dumps(planner.create_local_plan()))
    runs = []
    for _ in range(count):
        ours = one_run(job)
        ours_s = ours.planner_and_manifest_s + ours.seconds[READ_VOTES]
        coordinator = DefaultSavePlanner()
        coordinator.set_up_planner(state, is_coordinator=True)
        began = time.process_time()
        coordinator.create_global_plan([pickle.loads(one) for one in sent])  # noqa: S301 (our own bytes)
        theirs_s = time.process_time() - began
        ours_bytes = ours.vote_bytes + OPEN_BYTES_A_COMPONENT * world_size
        runs.append((ours_s, theirs_s, ours_bytes, sum(len(one) for one in sent)))
    return runs


# --- the report -----------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Run and print."""
    parser = options(__doc__)
    parser.add_argument("--ranks", type=int, default=10_000)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--dcp-ranks", type=int, default=64)
    arguments = parser.parse_args()
    job = large_job(arguments.ranks, arguments.tensors)
    count = 3 if arguments.quick else 9
    before = peak_bytes()
    runs = [one_run(job)]
    grown = peak_bytes() - before  # of the first run: what is freed is used again by the next ones
    runs += [one_run(job) for _ in range(count - 1)]
    beside = beside_dcp(arguments.dcp_ranks, count)
    ratios = {
        "seconds_of_bar": ratio([run.planner_and_manifest_s / BAR_S for run in runs]),
        "memory_of_bar": ratio([grown / BAR_BYTES]),
        "time_of_dcp": ratio([ours / theirs for ours, theirs, _, _ in beside]),
        "bytes_of_dcp": ratio([ours / theirs for _, _, ours, theirs in beside]),
    }
    figures = _figures(job, runs, grown, beside)
    emit("coordination", ratios, figures, as_json=arguments.json)


def _figures(
    job: Job, runs: list[Figures], grown: int, beside: list[tuple[float, float, int, int]]
) -> dict[str, float | int]:
    world_size = job.topology.world_size
    opened = OPEN_BYTES_A_COMPONENT * len(job.tensors) * world_size
    through = runs[0].vote_bytes + opened
    return {
        "ranks": world_size,
        "tensors": job.total_tensors(),
        "files": runs[0].files,
        **{
            f"seconds: {phase}": round(statistics.median(run.seconds[phase] for run in runs), 3)
            for phase in runs[0].seconds
        },
        "seconds: planner and manifest": round(
            statistics.median(run.planner_and_manifest_s for run in runs), 3
        ),
        "peak memory growth, MB": round(grown / 1e6, 1),
        "manifest, MB": round(runs[0].manifest_bytes / 1e6, 2),
        "bytes to rank 0 a save": through,
        "bytes to rank 0 a save and rank": round(through / world_size),
        "DCP, fewer ranks: seconds on rank 0": round(
            statistics.median(theirs for _, theirs, _, _ in beside), 3
        ),
        "ckptcoord, as many ranks: seconds on rank 0": round(
            statistics.median(ours for ours, _, _, _ in beside), 3
        ),
        "DCP, fewer ranks: bytes to rank 0": beside[0][3],
        "ckptcoord, as many ranks: bytes to rank 0": beside[0][2],
    }


if __name__ == "__main__":
    main()
