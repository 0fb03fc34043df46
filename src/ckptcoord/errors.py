"""One tree of errors. Each carries facts as attributes and says what, where and what to do next.

An error can cross to another rank: `to_document` gives its class and facts as JSON values,
`from_document` raises the same error there (`dist.world` carries them as values).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from ckptcoord.redact import redact, redact_all

if TYPE_CHECKING:
    from collections.abc import Mapping

Fact: TypeAlias = (
    "str | int | float | bool | list[Fact] | tuple[Fact, ...] | dict[str, Fact] | None"
)

_BY_NAME: dict[str, type[CkptError]] = {}


class CkptError(Exception):
    """Base of every error that ckptcoord raises on purpose. Tokens in its texts are masked.

    Attributes:
        code: stable identifier, shown as `error[CC012]`.
        exit_code: what the CLI exits with.
        what: one line: what went wrong, and where.
        help: what to do next; empty when there is nothing useful to say.
        facts: the values that the message was made of.
    """

    code: ClassVar[str] = "CC001"
    exit_code: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        _BY_NAME[cls.__name__] = cls

    def __init__(self, *, what: str, help: str = "", **facts: Fact) -> None:  # noqa: A002 (the CLI's own word)
        self.what = redact(what)
        self.help = redact(help)
        self.facts: dict[str, Fact] = redact_all(facts)
        if self.facts != facts:
            self.adopt(self.facts)  # as on the rank that such an error crosses to
        super().__init__(f"{self.what}. {self.help}" if help else self.what)

    def to_document(self) -> dict[str, Fact]:
        """This error as JSON values."""
        return {
            "type": type(self).__name__,
            "what": self.what,
            "help": self.help,
            "facts": dict(self.facts),
        }

    @staticmethod
    def from_document(document: Mapping[str, Any]) -> CkptError:
        """The error that `to_document` described; a plain CkptError when its class is unknown."""
        facts = document.get("facts")
        cls = _BY_NAME.get(str(document.get("type")), CkptError)
        error = cls.__new__(cls)
        values = facts if isinstance(facts, dict) else {}
        CkptError.__init__(
            error, what=str(document.get("what")), help=str(document.get("help") or ""), **values
        )
        error.adopt(values)
        return error

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Set the attributes from facts that have been JSON."""
        for name, value in facts.items():
            setattr(self, name, value)


# --- what the user asked for cannot be done ---------------------------------------------------


class ConfigError(CkptError, ValueError):
    """An argument or setting is wrong."""

    code = "CC002"
    exit_code = 2

    def __init__(self, *, field: str, why: str, help: str = "") -> None:  # noqa: A002
        self.field, self.why = field, why
        super().__init__(what=f"{field}: {why}", help=help, field=field, why=why)


class InvalidNameError(CkptError, ValueError):
    """A branch, tag, component or ref that is not well formed."""

    code = "CC003"
    exit_code = 2

    def __init__(self, *, kind: str, name: str, why: str) -> None:
        self.kind, self.name, self.why = kind, name, why
        shown = name if len(name) <= 80 else name[:77] + "..."
        super().__init__(what=f"{kind} {shown!r} {why}", kind=kind, name=shown, why=why)


class DuplicateComponentError(CkptError, ValueError):
    """Two StateComponents have the same key."""

    code = "CC004"
    exit_code = 2

    def __init__(self, *, key: str) -> None:
        self.key = key
        super().__init__(
            what=f"component {key!r} is declared twice",
            help="Give each StateComponent its own key",
            key=key,
        )


class UnknownGroupError(CkptError, ValueError):
    """A component names a process group that the coordinator was not given."""

    code = "CC005"
    exit_code = 2

    def __init__(self, *, component: str, group: str, known: tuple[str, ...]) -> None:
        self.component, self.group, self.known = component, group, known
        super().__init__(
            what=f"component {component!r} names the process group {group!r}, "
            f"which the coordinator was not given (it has: {', '.join(known) or 'none'})",
            help="Pass it in process_groups, or return it from get_process_groups()",
            component=component,
            group=group,
            known=list(known),
        )


class NotInGroupError(CkptError, ValueError):
    """A PER_GROUP component on a rank that no instance of the group contains."""

    code = "CC006"
    exit_code = 2

    def __init__(self, *, component: str, group: str, rank: int) -> None:
        self.component, self.group, self.rank = component, group, rank
        super().__init__(
            what=f"rank {rank} declares the PER_GROUP component {component!r}, "
            f"but is in no instance of the process group {group!r}",
            help="Declare the component on the group's members only, or widen the group",
            component=component,
            group=group,
            rank=rank,
        )


class UnsupportedStateError(CkptError, TypeError):
    """State that has no exact, pickle-free form."""

    code = "CC007"

    def __init__(self, *, path: str, type_name: str, why: str = "") -> None:
        self.path, self.type_name, self.why = path, type_name, why
        super().__init__(
            what=f"{path}: cannot store a {type_name}" + (f" ({why})" if why else ""),
            help="Return tensors, numbers, strings, bytes, None, lists, tuples and dicts from "
            "state_dict(), or give the StateComponent a get_state/set_state pair",
            path=path,
            type_name=type_name,
            why=why,
        )


class DisagreementError(CkptError):
    """Ranks called the same operation with different arguments."""

    code = "CC008"

    def __init__(self, *, field: str, values: dict[str, list[int]]) -> None:
        self.field, self.values = field, values
        shown = "; ".join(f"{value} on ranks {_ranks(ranks)}" for value, ranks in values.items())
        super().__init__(
            what=f"ranks disagree about {field}: {shown}",
            help="Every rank must make the same call; nothing was written",
            field=field,
            values={value: list(ranks) for value, ranks in values.items()},
        )


class ReplicationError(CkptError):
    """A component declared as the same on several ranks is not."""

    code = "CC009"

    def __init__(
        self, *, component: str, tensor: str, minority: tuple[int, ...], reference: int, apart: str
    ) -> None:
        self.component, self.tensor = component, tensor
        self.minority, self.reference, self.apart = tuple(minority), reference, apart
        super().__init__(
            what=f"replicas of component {component!r} differ: {tensor!r} on ranks "
            f"{_ranks(minority)} is not what rank {reference} holds ({apart})",
            help="Find what made these ranks diverge (unsynchronised seeds, a skipped all-reduce), "
            "resume from the last checkpoint, or declare the component PER_RANK",
            component=component,
            tensor=tensor,
            minority=list(minority),
            reference=reference,
            apart=apart,
        )


class CheckpointExistsError(CkptError):
    """The step is already committed on this branch."""

    code = "CC010"

    def __init__(self, *, checkpoint_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        super().__init__(
            what=f"{checkpoint_id} is already committed",
            help="Save another step, fork a branch, or pass overwrite=True",
            checkpoint_id=checkpoint_id,
        )


class StateMismatchError(CkptError):
    """What the checkpoint holds does not fit what the trainer asks for."""

    code = "CC015"

    def __init__(
        self,
        *,
        checkpoint: str,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
        mismatched: tuple[str, ...] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.missing, self.unexpected, self.mismatched = missing, unexpected, mismatched
        parts = [
            f"{word} {len(names)} ({', '.join(names[:8])}{', …' if len(names) > 8 else ''})"
            for word, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("mismatched", mismatched),
            )
            if names
        ]
        super().__init__(
            what=f"{checkpoint} does not fit the live state: {'; '.join(parts)}",
            help="Nothing was changed. Load with strict=False to skip what does not match",
            checkpoint=checkpoint,
            missing=list(missing),
            unexpected=list(unexpected),
            mismatched=list(mismatched),
        )


class MissingComponentsError(StateMismatchError):
    """A run is to go on with components that the checkpoint does not have at all.

    Attributes:
        ref: of the checkpoint.
        components: their keys.
        anew: the keys of those that begin anew already.
    """

    code = "CC017"

    def __init__(
        self, *, ref: str, components: tuple[str, ...], anew: tuple[str, ...] = ()
    ) -> None:
        self.ref, self.components, self.anew = ref, tuple(components), tuple(anew)
        named = ", ".join(self.components[:8]) + (", …" if len(self.components) > 8 else "")
        options = {
            "optimizer": "--reset-optimizer",
            "scheduler": "--reset-scheduler",
            "rng": "--seed N",
        }
        fork = f"`ckptcoord fork {ref} NEW_BRANCH"
        ways = [f"{fork} --weights-only -- COMMAND`"]
        if all(one in options for one in self.components):
            both = {*self.components, *self.anew}
            given = " ".join(option for one, option in options.items() if one in both)
            ways.append(f"{fork} {given} -- COMMAND`")
        help_ = f"Nothing was changed. Begin anew what is not there: {', or '.join(ways)}"
        if "model" in self.components:
            help_ = f"Nothing was changed. `ckptcoord inspect REPOSITORY {ref}` shows what it has"
        CkptError.__init__(
            self,
            what=f"{ref} does not have what this run goes on with: {named}",
            help=help_,
            ref=ref,
            components=list(components),
            anew=list(anew),
        )


class StateMovedError(CkptError):
    """State that a background save had yet to copy changed before the optimizer's step.

    Attributes:
        component: the first one that is concerned.
        tensors: all of them, each as `component.tensor`.
        learned: whether saves copy their components at the call from now on.
    """

    code = "CC016"

    def __init__(self, *, component: str, tensors: tuple[str, ...], learned: bool = False) -> None:
        self.component, self.tensors, self.learned = component, tuple(tensors), learned
        more = f" and {len(tensors) - 8} more" if len(tensors) > 8 else ""
        super().__init__(
            what=f"component {component!r} changed while a background save copied it, before any "
            f"optimizer's step: {', '.join(name[:80] for name in tensors[:8])}{more}",
            help="Nothing was written. "
            + (
                "Its component is copied at the call from now on"
                if learned
                else 'Save with deferred=False, which copies at the call, or deferred="auto", '
                "which learns what to copy there"
            ),
            component=component,
            tensors=list(tensors),
        )


# --- repositories, refs, writers ---------------------------------------------------------------


class RepositoryNotFoundError(CkptError, LookupError):
    """No repository at a path."""

    code = "CC020"
    exit_code = 10

    def __init__(self, *, path: str, nearest: tuple[str, ...] = (), variable: str = "") -> None:
        self.path, self.nearest = path, tuple(nearest)
        self.variable = variable  # of the environment, that names it
        super().__init__(
            what=f"no ckptcoord repository at {path}" + (f" ({variable})" if variable else ""),
            help=f"The workspace has: {', '.join(nearest)}"
            if nearest
            else "Name the folder that holds .ckptcoord (the trainer's output_dir)",
            path=path,
            nearest=list(nearest),
            variable=variable,
        )


class WorkspaceNotFoundError(CkptError, LookupError):
    """No workspace at a path, nor above it."""

    code = "CC070"
    exit_code = 10

    def __init__(self, *, path: str, variable: str = "") -> None:
        self.path, self.variable = path, variable
        super().__init__(
            what=f"no ckptcoord workspace at {path}" + (f" ({variable})" if variable else ""),
            help="Make one: ckptcoord workspace init PATH",
            path=path,
            variable=variable,
        )


class OutputDirError(CkptError):
    """A folder that is to be written to cannot be used."""

    code = "CC021"

    def __init__(self, *, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(
            what=f"cannot write to {path}: {why}",
            help="Choose another folder, or mend this one; nothing was changed",
            path=path,
            why=why,
        )


class RefNotFoundError(CkptError, LookupError):
    """A ref that names no checkpoint."""

    code = "CC012"
    exit_code = 12

    def __init__(self, *, ref: str, nearest: tuple[str, ...] = ()) -> None:
        self.ref, self.nearest = ref, tuple(nearest)
        super().__init__(
            what=f"no checkpoint {ref!r}",
            help=f"Nearest: {', '.join(nearest)}" if nearest else "The repository has none yet",
            ref=ref,
            nearest=list(nearest),
        )


class FencedError(CkptError):
    """Another writer has claimed the branch since; this one must not commit (INV-2)."""

    code = "CC011"
    exit_code = 11

    def __init__(
        self, *, branch: str, writer: str, holder: str, epoch: int, host: str | None = None
    ) -> None:
        self.branch, self.writer, self.holder, self.epoch = branch, writer, holder, epoch
        self.host = host
        super().__init__(
            what=f"writer {writer} was fenced: branch {branch!r} has been claimed by writer "
            f"{holder}{f' on host {host!r}' if host else ''} (epoch {epoch})",
            help="Another job or a newer incarnation writes this branch. Stop one of them, or "
            "save to a branch of its own; nothing was deleted",
            branch=branch,
            writer=writer,
            holder=holder,
            epoch=epoch,
            host=host,
        )


class CommitUnknownError(CkptError):
    """Whether the append took effect could not be found out (INV-6)."""

    code = "CC022"

    def __init__(self, *, entry: str, why: str) -> None:
        self.entry, self.why = entry, why
        super().__init__(
            what=f"it is unknown whether {entry} was appended: {why}",
            help="Nothing was deleted. Run `ckptcoord log` once the storage answers again",
            entry=entry,
            why=why,
        )


class NotNewestError(CkptError):
    """Going on from a checkpoint, on a branch that has newer ones."""

    code = "CC071"

    def __init__(self, *, ref: str, branch: str, newer: tuple[str, ...]) -> None:
        self.ref, self.branch, self.newer = ref, branch, tuple(newer)
        more = f" and {len(newer) - 3} more" if len(newer) > 3 else ""
        super().__init__(
            what=f"{ref} is not the newest of branch {branch!r}: {', '.join(newer[:3])}{more} "
            "come after it",
            help=f"Fork it (`ckptcoord fork {ref} NAME -- COMMAND`), or drop the newer ones "
            f"(`ckptcoord resume {ref} --rewind -- COMMAND`); nothing was changed",
            ref=ref,
            branch=branch,
            newer=list(newer),
        )


class CommandError(CkptError):
    """A command that cannot be started."""

    code = "CC072"
    exit_code = 127

    def __init__(self, *, command: str, why: str) -> None:
        self.command, self.why = command, why
        super().__init__(
            what=f"cannot start {command!r}: {why}",
            help="Nothing was changed",
            command=command,
            why=why,
        )


class BranchExistsError(CkptError):
    """A fork onto a branch that is there already."""

    code = "CC023"

    def __init__(self, *, branch: str) -> None:
        self.branch = branch
        super().__init__(
            what=f"branch {branch!r} exists already",
            help="Choose another name, or go on with that branch",
            branch=branch,
        )


class CheckpointInUseError(CkptError):
    """A checkpoint that something still names must not be dropped."""

    code = "CC024"

    def __init__(self, *, checkpoint_id: str, used_by: str, help: str = "") -> None:  # noqa: A002
        self.checkpoint_id, self.used_by = checkpoint_id, used_by
        super().__init__(
            what=f"{checkpoint_id} is still named by {used_by}",
            help=help or "Delete or move that first; nothing was changed",
            checkpoint_id=checkpoint_id,
            used_by=used_by,
        )


class BaseGoneError(CkptError):
    """The checkpoint that a save made its deltas against is gone (INV-5)."""

    code = "CC025"

    def __init__(self, *, checkpoint_id: str, folder: str) -> None:
        self.checkpoint_id, self.folder = checkpoint_id, folder
        super().__init__(
            what=f"{checkpoint_id} needs {folder}, the base of its deltas, which was deleted "
            "meanwhile",
            help="Nothing was committed; save again",
            checkpoint_id=checkpoint_id,
            folder=folder,
        )


class BaseUnreadableError(CkptError):
    """The checkpoint that deltas would be against cannot be read."""

    code = "CC027"

    def __init__(self, *, folder: str, why: str) -> None:
        self.folder, self.why = folder, why
        super().__init__(
            what=f"{folder}, the base of this save's deltas, cannot be read: {why}",
            help="A coordinator saves again, as an anchor; run `ckptcoord verify` on what is there",
            folder=folder,
            why=why,
        )


class AttemptSweptError(CkptError):
    """gc took a save for dead and swept its files before it could commit (INV-5)."""

    code = "CC026"

    def __init__(self, *, checkpoint_id: str, attempt: str) -> None:
        self.checkpoint_id, self.attempt = checkpoint_id, attempt
        super().__init__(
            what=f"the files of the save of {checkpoint_id} (attempt {attempt}) were swept by gc, "
            "which took it for dead",
            help="Nothing was committed; save again",
            checkpoint_id=checkpoint_id,
            attempt=attempt,
        )


class TagExistsError(CkptError):
    """A tag that names another checkpoint already."""

    code = "CC028"

    def __init__(self, *, tag: str, target: str) -> None:
        self.tag, self.target = tag, target
        super().__init__(
            what=f"tag {tag!r} names {target} already",
            help="Choose another name, or move it with --force",
            tag=tag,
            target=target,
        )


class TensorNotFoundError(CkptError, LookupError):
    """A name or pattern that no tensor of a checkpoint has."""

    code = "CC029"
    exit_code = 12

    def __init__(self, *, checkpoint: str, name: str, nearest: tuple[str, ...] = ()) -> None:
        self.checkpoint, self.name, self.nearest = checkpoint, name, tuple(nearest)
        shown = name if len(name) <= 200 else name[:197] + "..."
        super().__init__(
            what=f"{checkpoint} has no tensor {shown!r}",
            help=f"Nearest: {', '.join(nearest)}" if nearest else "It has no tensors",
            checkpoint=checkpoint,
            name=shown,
            nearest=list(nearest),
        )


class NotMergeableError(CkptError):
    """Checkpoints that have no average.

    Attributes:
        problems: `tensor: why`, all of them.
    """

    code = "CC080"

    def __init__(self, *, problems: tuple[str, ...]) -> None:
        self.problems = tuple(problems)
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        shown = "; ".join(problem[:300] for problem in problems[:8])
        super().__init__(
            what=f"there is no average: {shown}{more}",
            help="Nothing was written. `ckptcoord merge --dry-run` lists what does not fit; "
            "--keep-first takes integers that differ from the first checkpoint",
            problems=list(problems),
        )


# --- several ranks ------------------------------------------------------------------------------


class CollectiveError(CkptError):
    """An operation of all ranks that failed on some.

    Attributes:
        phase: the step of the protocol in which it failed.
        failures: rank to reason, for every rank that failed or fell silent.
        silent: the ranks that said nothing before the deadline.
    """

    operation: ClassVar[str] = "operation"

    def __init__(
        self, *, phase: str, failures: dict[int, str], silent: tuple[int, ...] = (), label: str = ""
    ) -> None:
        self.phase, self.failures, self.silent, self.label = phase, failures, tuple(silent), label
        shown = "; ".join(f"rank {rank}: {failures[rank]}" for rank in sorted(failures)[:8])
        more = f"; and {len(failures) - 8} ranks more" if len(failures) > 8 else ""
        super().__init__(
            what=f"{self.operation}{f' of {label}' if label else ''} failed in phase "
            f"{phase!r}: {shown}{more}",
            help=self._advice(),
            phase=phase,
            failures={str(rank): why for rank, why in failures.items()},
            silent=list(silent),
            label=label,
        )

    def _advice(self) -> str:
        return ""

    def adopt(self, facts: Mapping[str, Any]) -> None:
        """Set the attributes from facts that have been JSON."""
        super().adopt(facts)
        # JSON's keys are text; whoever catches this asks by rank, on every rank.
        failures = facts.get("failures") or {}
        self.failures = {int(rank): why for rank, why in failures.items()}
        self.silent = tuple(facts.get("silent") or ())


class SaveAbortedError(CollectiveError):
    """A save that no rank may count on; the last commit stands."""

    code = "CC030"
    operation = "save"

    def _advice(self) -> str:
        return "The last committed checkpoint is intact and the next save will start afresh"


class LoadAbortedError(CollectiveError):
    """A load that failed on some rank; before phase "apply", nothing live was changed (INV-8)."""

    code = "CC031"
    operation = "load"

    def _advice(self) -> str:
        if self.phase == "apply":
            return "Some components may hold the loaded state and others not: load again first"
        return "No live tensor was changed on any rank"


class SetupAbortedError(CollectiveError):
    """A coordinator that could not be set up on some rank; nothing was saved."""

    code = "CC034"
    operation = "setting up the coordinator"


class StoreUnreachableError(CkptError):
    """The c10d store did not answer before the deadline, or is gone."""

    code = "CC032"

    def __init__(self, *, phase: str, host: str, why: str) -> None:
        self.phase, self.host, self.why = phase, host, why
        super().__init__(
            what=f"the c10d store at {host} {why} in phase {phase!r}",
            help="Its host is dead, stopped or cut off; look there first",
            phase=phase,
            host=host,
            why=why,
        )


class ClosedError(CkptError):
    """An operation on something that was closed."""

    code = "CC033"

    def __init__(self, *, thing: str) -> None:
        self.thing = thing
        super().__init__(what=f"the {thing} is closed", thing=thing)


class ThreadLimitError(CkptError):
    """The system starts no more threads for this process."""

    code = "CC035"

    def __init__(self) -> None:
        # Other ranks hear this alone: it says where to look.
        super().__init__(
            what="no more threads can be started here: mostly the limit of processes is reached "
            "(ulimit -u, or pids.max of a container)",
            help="Raise that limit, or run fewer processes and threads; then save again",
        )


# --- accounts -------------------------------------------------------------------------------------


class LoginError(CkptError):
    """A token that cannot be checked, kept or found again."""

    code = "CC050"

    def __init__(self, *, where: str, why: str, help: str = "") -> None:  # noqa: A002
        self.where, self.why = where, why
        super().__init__(what=f"{where}: {why}", help=help, where=where, why=why)


class TokenRefusedError(CkptError):
    """The server does not accept the token."""

    code = "CC051"

    def __init__(self, *, url: str, status: int) -> None:
        self.url, self.status = url, status
        super().__init__(
            what=f"{url} refused the token (HTTP {status})",
            help="Make a new token there, and `ckptcoord login` with it",
            url=url,
            status=status,
        )


class NotLoggedInError(CkptError):
    """Nobody is logged in."""

    code = "CC052"

    def __init__(self) -> None:
        super().__init__(
            what="nobody is logged in", help="Run `ckptcoord login --verify-url https://...`"
        )


# --- storage and what is on it --------------------------------------------------------------------


class StorageError(CkptError):
    """The storage refused an operation."""

    code = "CC040"
    _advice: ClassVar[str] = ""

    def __init__(self, *, operation: str, path: str, why: str, errno: int | None = None) -> None:
        self.operation, self.path, self.why, self.errno = operation, path, why, errno
        super().__init__(
            what=f"{path}: {operation} failed: {why}",
            help=self._advice,
            operation=operation,
            path=path,
            why=why,
            errno=errno,
        )


class StorageFullError(StorageError):
    """No space, quota or inodes left."""

    code = "CC014"
    exit_code = 14
    _advice = "Make room, as with `ckptcoord gc`; `ckptcoord du` shows what takes how much"


class UnsafePathError(CkptError):
    """A path that leaves the repository, or is no plain file (link, device, FIFO)."""

    code = "CC041"
    exit_code = 13

    def __init__(self, *, path: str, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(what=f"refused to open {path!r}: {why}", path=path, why=why)


class CorruptError(CkptError):
    """Base of: what was read is not what was written (INV-9).

    Attributes:
        tensor: the one that cannot be read; empty where it is the file, or not known.
    """

    code = "CC013"
    exit_code = 13
    tensor: str = ""

    def __init__(self, *, path: str, why: str, help: str = "", tensor: str = "") -> None:  # noqa: A002
        self.path, self.why, self.tensor = path, why, tensor
        super().__init__(
            what=f"{path}: {why}",
            help=help or "Run `ckptcoord verify`, or load an earlier checkpoint (`ckptcoord log`)",
            path=path,
            why=why,
        )
        if tensor:
            self.facts.update(tensor=tensor)


class DigestMismatchError(CorruptError):
    """Bytes whose digest is not the recorded one."""

    def __init__(self, *, path: str, expected: str, found: str, tensor: str = "") -> None:
        self.expected, self.found = expected, found
        name = f"tensor {tensor!r}" if tensor else "the file"
        why = f"{name} is corrupt (digest {found[:19]}… expected {expected[:19]}…)"
        super().__init__(path=path, why=why, tensor=tensor)
        self.facts.update(tensor=tensor, expected=expected, found=found)


class MissingFileError(CorruptError):
    """A file that a manifest names is not there."""

    def __init__(self, *, path: str) -> None:
        super().__init__(path=path, why="the file is missing")


class ManifestError(CorruptError):
    """A manifest, log entry or state document that breaks the format."""


class FormatVersionError(CkptError):
    """Written by a newer ckptcoord than this one."""

    code = "CC042"

    def __init__(self, *, path: str, found: int, supported: int) -> None:
        self.path, self.found, self.supported = path, found, supported
        super().__init__(
            what=f"{path}: format version {found} is newer than {supported}, the newest that this "
            "ckptcoord reads",
            help="Upgrade: pip install -U ckptcoord",
            path=path,
            found=found,
            supported=supported,
        )


class FormatError(CkptError):
    """What is to be imported or loaded is in no known format, or needs what must not be done."""

    code = "CC060"

    def __init__(self, *, path: str, why: str, help: str = "") -> None:  # noqa: A002
        self.path, self.why = path, why
        super().__init__(what=f"{path}: {why}", help=help, path=path, why=why)


def _ranks(ranks: tuple[int, ...] | list[int]) -> str:
    """`0-2,5` for (0, 1, 2, 5)."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


_BY_NAME["CkptError"] = CkptError
