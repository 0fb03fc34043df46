"""CheckpointCoordinator: the public face of saving and loading."""

from __future__ import annotations

import os
import secrets
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ckptcoord.core.lossy import EXACT, CompressionLevel
from ckptcoord.core.refs import BranchName, CheckpointId, TagName, parse_ref
from ckptcoord.core.sharing import SharingPattern
from ckptcoord.dist.background import Background
from ckptcoord.dist.capture import capture
from ckptcoord.dist.config import CoordinatorConfig
from ckptcoord.dist.deadline import Deadline
from ckptcoord.dist.loading import LoadReport, load
from ckptcoord.dist.masking import mask_secrets
from ckptcoord.dist.messages import as_list, same_on_all
from ckptcoord.dist.opening import declaration
from ckptcoord.dist.report import SaveTimer
from ckptcoord.dist.request import SaveRequest, finite_metrics
from ckptcoord.dist.saving import SaveTask, hold, save, verify
from ckptcoord.dist.session import Session, close_after, heard
from ckptcoord.dist.shutdown import forget, register
from ckptcoord.dist.topology import agree_on_topology
from ckptcoord.dist.world import World, current_world
from ckptcoord.errors import (
    CkptError,
    ClosedError,
    ConfigError,
    DuplicateComponentError,
    InvalidNameError,
    RefNotFoundError,
    SaveAbortedError,
    SetupAbortedError,
)
from ckptcoord.plan.lineage import Precision
from ckptcoord.plan.placement import scope_of
from ckptcoord.repo.export import check_model_folder, write_model_folder
from ckptcoord.repo.repository import Repository, create_repository
from ckptcoord.repo.shards import TensorSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from ckptcoord.core.entries import Commit
    from ckptcoord.core.jsonio import JsonValue
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.core.topology import Topology
    from ckptcoord.dist.config import Deferred
    from ckptcoord.dist.savequeue import PendingSave

BEST_TAG = "best"
_NO_DELTAS = 'has no effect with compression="off", which writes no deltas'
_CODE = 'Set level="auto" in Compression, or compression="auto" for a component'


class CheckpointCoordinator:
    """Saves and loads declared components, on all ranks or on none.

    Every method that says so is collective: all ranks call it, in the same order. Threads that use
    one coordinator do so one after the other.

    Args:
        state_components: what to save.
        process_groups: name to this rank's instance of the group (a ProcessGroup, or its global
            ranks); None where the rank is in none.
        dist: the ranks of the job; by default torch.distributed's when it is initialised, else a
            world of one.
        output_dir: the repository's folder, the same on every rank; made if absent.
        config: settings.

    Raises:
        CkptError: a duplicate key, an unknown group, a rank outside its group, an output_dir that
            cannot be written; raised on every rank before anything is written.
    """

    def __init__(
        self,
        state_components: Sequence[StateComponent],
        process_groups: Mapping[str, object] | None = None,
        dist: World | None = None,
        output_dir: str | os.PathLike[str] = "checkpoints",
        *,
        config: CoordinatorConfig | None = None,
    ) -> None:
        mask_secrets()
        self._config = config or CoordinatorConfig()
        self._world = dist or current_world()
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.RLock()  # a handler of a signal may call within a call
        self._busy: int | None = None  # the thread that is in an operation
        self._closing = False  # which is `close`
        try:
            self._session = self._set_up(
                tuple(state_components), dict(process_groups or {}), output_dir
            )
        except BaseException:
            self._world.close()
            raise
        self._background = Background(self._session)
        register(self)

    @property
    def repository(self) -> Repository:
        """The repository that it writes to."""
        return self._session.repository

    def save_checkpoint(  # noqa: PLR0913 (a public name; all but the first three by keyword)
        self,
        checkpoint_path: str | os.PathLike[str] | None = None,
        checkpoint_id: str | None = None,
        validate: bool = False,  # noqa: FBT001, FBT002 (a public name)
        *,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        epoch: float | None = None,
        overwrite: bool = False,
    ) -> str:
        """Save all components as one checkpoint. Collective; returns its folder, absolute.

        Name it by `step`, by `checkpoint_id` (`checkpoint-500`), or by the path of a folder of
        that name in output_dir. `validate` reads every byte back after the commit. Metrics that
        are NaN or infinite are left out of the manifest.

        Raises:
            SaveAbortedError: some rank failed or fell silent; the last commit stands.
            CheckpointExistsError: the step is committed already and `overwrite` is false.
            FencedError: another writer has claimed the branch.
            ReplicationError: replicas differ.
            CkptError: what every rank said alike.
        """
        ask = partial(
            self._request,
            partial(self._name, checkpoint_path, checkpoint_id, step),
            message=message,
            metrics=metrics,
            epoch=epoch,
            overwrite=bool(overwrite),
        )
        with self._operation():
            timer = SaveTimer(self._config.clock, blocking=True)
            task = SaveTask(
                request=heard(ask),
                state=lambda: hold(self._session),
                timer=timer,
                validate=bool(validate),
            )
            folder = save(self._session, task)
            if validate:
                verify(self._session, task)
        return str(Path(self.repository.url) / folder)

    def save_checkpoint_async(  # noqa: PLR0913 (a public name; all but the first three by keyword)
        self,
        checkpoint_path: str | os.PathLike[str] | None = None,
        checkpoint_id: str | None = None,
        validate: bool = False,  # noqa: FBT001, FBT002 (a public name)
        *,
        step: int | None = None,
        message: str = "",
        metrics: Mapping[str, float] | None = None,
        epoch: float | None = None,
        overwrite: bool = False,
        deferred: Deferred | None = None,
    ) -> PendingSave:
        """Save all components while training goes on. Collective; arguments as `save_checkpoint`.

        The checkpoint holds the state at this call. It returns once what this rank writes is
        copied, or, as far as `deferred` allows (None: as the settings say), before: then the step
        of any torch optimizer waits for the rest. At most `queue_depth` saves are unfinished at a
        time; one more waits. Commits come in the order of the calls.

        What fails, also of the request itself, is in the `PendingSave`, and is raised, as
        `on_failure` says, by a later call: the first that no rank had made when all had heard of
        it, or `wait()` or `close()`. That call does nothing else, but that `close()` closes.

        Raises:
            CkptError: an earlier save in the background failed.
        """
        ask = partial(
            self._request,
            partial(self._name, checkpoint_path, checkpoint_id, step),
            message=message,
            metrics=metrics,
            epoch=epoch,
            overwrite=bool(overwrite),
        )
        with self._operation(alone=False):
            return self._background.save(ask, deferred=deferred, validate=validate, owner=self)

    def wait(self) -> None:
        """Wait until every save in the background is finished. Collective.

        Raises:
            CkptError: one of them failed.
        """
        with self._operation():
            return

    def load_checkpoint(
        self,
        checkpoint_path: str | os.PathLike[str] | None = None,
        strict: bool = True,  # noqa: FBT001, FBT002 (a public name)
        *,
        read_once: bool = False,
        permit: Callable[[Commit], None] | None = None,
    ) -> LoadReport:
        """Load every component, on all ranks or on none. Collective.

        Args:
            checkpoint_path: a ref (`main@500`, `latest`, a tag) or a checkpoint's folder; None:
                the newest of the coordinator's branch.
            strict: refuse a checkpoint that lacks what is live, or has tensors of another shape or
                dtype; else skip these and report them.
            read_once: what several ranks want, one of them reads from storage and sends to the
                others over a gloo group, for storage that is slow or paid for by the byte. All is
                then read into new memory, as much as the state has, before it is copied.
            permit: given on all ranks or on none. Called on rank 0 with what is about to be loaded,
                when every rank is ready and nothing has changed yet; what it raises ends the load
                on all of them.

        Raises:
            RefNotFoundError: there is no such checkpoint; the nearest are named.
            StateMismatchError: it does not fit.
            CorruptError: it is damaged.
            LoadAbortedError: some rank could not read its part or fell silent.
        """
        with self._operation():
            self._background.forget()
            return load(
                self._session,
                lambda: self._ref(checkpoint_path),
                strict=strict,
                read_once=read_once,
                permit=permit,
            )

    def resolve_checkpoint_path(
        self, checkpoint_path: str | os.PathLike[str] | None = None
    ) -> str | None:
        """The folder that a ref names, absolute; None when there is no such checkpoint.

        Not collective: ranks that ask while another one saves may see different answers.
        """
        try:
            commit = self.repository.resolve(self._ref(checkpoint_path))
        except RefNotFoundError:
            return None
        return str(Path(self.repository.url) / commit.path)

    def set_best_checkpoint(self, ref: str) -> None:
        """Point the tag `best` at a checkpoint. Collective.

        Raises:
            RefNotFoundError: there is no such checkpoint.
        """
        with self._operation():
            self._world.begin(SaveAbortedError, f"tag {BEST_TAG}")
            self._world.agree(
                "tag",
                heard(lambda: self._ref(ref)),
                self._tag,
                deadline=self._session.deadline(),
            )

    def save_model(
        self,
        output_dir: str | os.PathLike[str] | None = None,
        overwrite_output_dir: bool = False,  # noqa: FBT001, FBT002 (a public name)
    ) -> str:
        """Write the `model` component alone as a Hugging Face folder. Collective; rank 0 writes.

        Args:
            output_dir: by default `model` in the repository.
            overwrite_output_dir: replace a folder that is not empty.

        Raises:
            ConfigError: no component is called `model`, the folder is not empty, or checkpoints
                are in it.
            OutputDirError: it cannot be made.
        """
        here = Path(self.repository.url)
        with self._operation():
            target = heard(lambda: here / "model" if output_dir is None else Path(output_dir))
            self._world.begin(SaveAbortedError, "the model's folder")
            written = self._world.agree(
                "model",
                target if isinstance(target, CkptError) else str(target),
                lambda said: self._write_model(Path(str(said[0])), overwrite=overwrite_output_dir),
                deadline=self._session.deadline(),
            )
        return str(written)

    def close(self) -> None:
        """Finish the saves in the background and end what runs for it. Safe to call twice.

        Collective where saves are unfinished. On a terminal, rank 0 shows how many are left.

        Raises:
            CkptError: one of them failed; it is closed all the same.
        """
        if os.getpid() != self._process:
            return  # a forked child's: its threads and its saves are the parent's
        if self._closing and self._busy == threading.get_ident():
            return  # a signal's handler calls it; the call around that goes on
        self._check_caller()
        with self._lock:
            self._busy, self._closing = threading.get_ident(), True
            try:
                if not self._closed:
                    self._close()
            finally:
                self._busy, self._closing = None, False

    def _close(self) -> None:
        self._background.drain(show=self._world.rank == 0)  # interrupted, it stays open
        self._closed = True
        forget(self)
        try:
            self._background.close()
        finally:
            # For ranks that go on, and wait for this one in vain.
            self._world.note("coordinator: closed")
            self._world.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        close_after(exc, self.close, what="A save in the background")

    def _set_up(
        self,
        components: tuple[StateComponent, ...],
        groups: dict[str, object],
        output_dir: str | os.PathLike[str],
    ) -> Session:
        """Check everything on every rank before the first byte is written."""
        config, world = self._config, self._world
        world.begin(SetupAbortedError, str(output_dir))
        deadline = Deadline.after(config.timeout_s)
        topology = agree_on_topology(world, groups, deadline)
        keys = heard(lambda: _checked_keys(components, topology, world.rank))
        world.agree(
            "components", keys, lambda said: _check_settings(config, said), deadline=deadline
        )
        # Ranks that go on from a failure in several ways would be apart from there.
        world.agree(
            "on_failure",
            str(config.on_failure),
            lambda said: same_on_all("on_failure", said),
            deadline=deadline,
        )
        world.agree(
            "output_dir",
            None,
            lambda _: create_repository(output_dir, clock=config.clock).url,
            deadline=deadline,
        )
        opened = heard(lambda: create_repository(output_dir, clock=config.clock))
        word = opened if isinstance(opened, CkptError) else None
        world.agree("repository", word, lambda _: None, deadline=deadline)
        if isinstance(opened, CkptError):
            raise opened
        return Session(
            world=world,
            topology=topology,
            repository=opened,
            components=components,
            config=config,
            writer=secrets.token_hex(16),
        )

    @contextmanager
    def _operation(self, *, alone: bool = True) -> Iterator[None]:
        """One operation at a time: rounds are counted, and two at once would mix theirs up.

        `alone`: after all saves in the background.

        Raises:
            CkptError: one of these failed.
            ClosedError: the coordinator is closed.
            ConfigError: it is called from where it would wait for itself.
        """
        self._check_caller()
        with self._lock:
            if self._closed:
                raise ClosedError(thing="coordinator")
            self._busy = threading.get_ident()
            try:
                self._background.queue.enter(alone=alone)
                yield
            finally:
                self._busy = None

    def _check_caller(self) -> None:
        """Before any lock: a caller that it would wait for, or whose locks are copies.

        Raises:
            ConfigError: it is called by a component's `get_state`, by `on_saved`, by a callback of
                a `PendingSave`, or in a child.
        """
        why = ""
        if os.getpid() != self._process:
            why = f"was made in process {self._process}, of which this is a forked child"
        elif self._busy == threading.get_ident():
            why = "is called from within its own operation"
        elif self._background.is_own_thread():
            why = (
                "is called by a save in the background, as from on_saved or a callback of a "
                "PendingSave: it would wait for itself"
            )
        if why:
            raise ConfigError(field="CheckpointCoordinator", why=why)

    @staticmethod
    def _request(
        name: Callable[[], CheckpointId],
        *,
        message: str,
        metrics: Mapping[str, float] | None,
        epoch: float | None,
        overwrite: bool,
    ) -> SaveRequest:
        return SaveRequest(
            checkpoint_id=name(),
            message=message,
            metrics=finite_metrics(metrics),
            epoch=epoch,
            overwrite=overwrite,
        )

    def _name(
        self,
        path: str | os.PathLike[str] | None,
        checkpoint_id: str | None,
        step: int | None,
    ) -> CheckpointId:
        branch = BranchName(self._config.branch)
        names = []
        if step is not None:
            names.append(CheckpointId(branch, step))
        if checkpoint_id is not None:
            names.append(CheckpointId.parse(_text("checkpoint id", checkpoint_id)))
        if path is not None:
            folder = Path(_text("checkpoint_path", path))
            if not self.repository.is_own(folder):
                raise ConfigError(
                    field="checkpoint_path",
                    why=f"{path} is not a folder of the repository {self.repository.url}",
                    help="Give step=, or a path in output_dir",
                )
            names.append(CheckpointId.parse(folder.name))
        if len(set(names)) != 1 or names[0].branch != branch:
            raise ConfigError(
                field="save_checkpoint",
                why=f"names {', '.join(map(str, names)) or 'no checkpoint'} on branch {branch}",
                help="Give exactly one of step=, checkpoint_id= and checkpoint_path=",
            )
        return names[0]

    def _ref(self, ref: str | os.PathLike[str] | None) -> str:
        """As text; checked, for what is no ref could not even be said to the other ranks."""
        if ref is None:
            return f"{self._config.branch}@latest"
        text = _text("ref", ref)
        if not isinstance(ref, str) and "/" not in text:
            text = f"./{text}"
        parse_ref(text)
        return text

    def _tag(self, said: list[JsonValue]) -> JsonValue:
        same_on_all("ref", said)
        commit = self.repository.resolve(str(said[0]))
        self.repository.tag(TagName(BEST_TAG), commit.checkpoint_id, writer=self._session.writer)
        return None

    def _write_model(self, target: Path, *, overwrite: bool) -> JsonValue:
        model = next((c for c in self._session.components if c.key == "model"), None)
        if model is None:
            raise ConfigError(
                field="save_model",
                why="no component has the key 'model'",
                help="Declare the model with StateComponent(key='model', ...)",
            )
        if model.sharing_pattern in (SharingPattern.PER_RANK, SharingPattern.PER_GROUP):
            raise ConfigError(
                field="save_model",
                why=f"the model is {model.sharing_pattern.name}: no rank has all of it",
                help="Save a checkpoint; ckptcoord.export_model(repository, folder) puts the "
                "parts together",
            )
        check_model_folder(target, self.repository, overwrite=overwrite)
        captured = capture(model)
        sources = [
            TensorSource(spec=tensor.spec, read=tensor.read) for tensor in captured.tensors.values()
        ]
        to_json = getattr(getattr(model.stateful, "config", None), "to_json_string", None)
        write_model_folder(
            target,
            sources,
            max_shard_size=self._config.max_shard_size,
            config=str(to_json()).encode() if callable(to_json) else b"",
        )
        return str(target)


def _checked_keys(
    components: tuple[StateComponent, ...], topology: Topology, rank: int
) -> JsonValue:
    """Each key, which is there once, of a component with a copy that this rank takes part in.

    With the component's own level of compression.
    """
    seen: set[str] = set()
    for component in components:
        # Two keys that differ only in case would be one file on some file systems.
        if component.key.lower() in seen:
            raise DuplicateComponentError(key=component.key)
        seen.add(component.key.lower())
        scope_of(component.spec, topology, rank)
        declaration(component)
    return [[one.key, one.compression and one.compression.value] for one in components]


def _check_settings(config: CoordinatorConfig, said: Sequence[JsonValue]) -> None:
    """Each component that has a setting is declared by some rank, and settings have an effect."""
    rule = config.rule
    pairs = [as_list(pair) for rank in said for pair in as_list(rank)]
    own = {
        str(key): None if level is None else CompressionLevel(str(level)) for key, level in pairs
    }
    for key, lossy in rule.lossy.items():
        field = f"compression.lossy[{key!r:.40}]"
        if key not in own:
            raise ConfigError(
                field=field,
                why="is of no component that there is",
                help=f"The components are {', '.join(sorted(own))}",
            )
        if lossy != EXACT and rule.level_of(own[key]) is CompressionLevel.OFF:
            raise ConfigError(field=field, why=_NO_DELTAS, help=_CODE)
    coded = any(rule.level_of(level) is not CompressionLevel.OFF for level in own.values())
    if own and not coded and not rule.is_exact:
        near = rule.precision is Precision.BOUNDED
        setting = "precision" if near else "change_threshold"
        raise ConfigError(field=f"compression.{setting}", why=_NO_DELTAS, help=_CODE)


def _text(kind: str, value: object) -> str:
    """A name or path as text."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise InvalidNameError(kind=kind, name=f"a {type(value).__name__}", why="is no text")
    return text
