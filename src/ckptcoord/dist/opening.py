"""The first round of a save: do all ranks mean the same, and do replicas look the same."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from blake3 import blake3

from ckptcoord.core.jsonio import JsonValue, dump_json, parse_json
from ckptcoord.core.lossy import EXACT, CompressionLevel
from ckptcoord.core.sharing import ComponentSpec, SharingPattern, StateComponent, ValidationLevel
from ckptcoord.dist.messages import as_dict, as_list
from ckptcoord.dist.replication import Divergence
from ckptcoord.errors import ConfigError, DisagreementError, ManifestError
from ckptcoord.plan.placement import scopes_of
from ckptcoord.repo.bases import Base
from ckptcoord.repo.manifests import Declared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ckptcoord.core.lossy import Lossy
    from ckptcoord.core.topology import Scope, Topology

_JOB_WIDE = (
    *("step", "branch", "overwrite", "world size", "compression"),
    *("validate", "saving in the background", "deferred"),
)
_METADATA_DEPTH = 31  # what a manifest takes (core/manifest.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What rank 0 decided.

    Attributes:
        attempt: the nonce of the attempt; empty when replicas diverged.
        writer: rank 0's nonce, by which the log knows it.
        diverged: components whose replicas differ.
        versions: for PER_GROUP copies whose members hold different names, by
            `component/scope label`: a digest of who holds what.
        documents: those of them whose members' state documents differ, too.
        base: what deltas are against; None when this is an anchor.
    """

    attempt: str = ""
    writer: str = ""
    diverged: tuple[Divergence, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    documents: frozenset[str] = frozenset()
    base: Base | None = None

    def to_json(self) -> JsonValue:
        """As the message that all ranks read."""
        return {
            "attempt": self.attempt,
            "writer": self.writer,
            "diverged": [one.to_json() for one in self.diverged],
            "versions": dict(self.versions),
            "documents": list[JsonValue](sorted(self.documents)),
            "base": None if self.base is None else self.base.to_json(),
        }

    @classmethod
    def from_json(cls, value: JsonValue) -> Opening:
        """What `to_json` wrote."""
        document = as_dict(value)
        return cls(
            attempt=str(document["attempt"]),
            writer=str(document["writer"]),
            diverged=tuple(Divergence.from_json(one) for one in as_list(document["diverged"])),
            versions={key: str(v) for key, v in as_dict(document["versions"]).items()},
            documents=frozenset(map(str, as_list(document["documents"]))),
            base=None if document["base"] is None else Base.from_json(document["base"]),
        )


def declaration(component: StateComponent) -> JsonValue:
    """A component as this rank declares it, for the message.

    Raises:
        ConfigError: its metadata is nothing that a manifest can hold.
    """
    return [
        component.key,
        component.sharing_pattern.value,
        component.process_group_name,
        validation_of(component).value,
        component.required,
        _metadata(component),
        None if component.compression is None else component.compression.value,
        _lossy_json(component.lossy),
    ]


def _lossy_json(lossy: Lossy | None) -> JsonValue:
    return None if lossy is None else dict(asdict(lossy))


def _metadata(component: StateComponent) -> JsonValue:
    field = f"StateComponent({component.key!r}).metadata"
    given = component.metadata
    if type(given) is dict and not given:
        return {}
    try:
        value = parse_json(dump_json(dict(given)), path=field, max_depth=_METADATA_DEPTH)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(field=field, why=f"is not JSON: {error}") from error
    except ManifestError as error:
        raise ConfigError(field=field, why=error.why) from error
    if value != given:
        raise ConfigError(field=field, why="would not come back as it is: use text as keys, lists")
    return value


def validation_of(component: StateComponent) -> ValidationLevel:
    """How closely its replicas are compared."""
    return component.validation_level if component.validate_replication else ValidationLevel.NONE


def declared(words: Sequence[dict[str, JsonValue]]) -> tuple[Declared, ...]:
    """Every component that some rank declared, sorted by key."""
    found = {one.spec.key: one for word in words for one in _declarations(word)}
    return tuple(found[key] for key in sorted(found))


def check_agreement(words: Sequence[dict[str, JsonValue]]) -> None:
    """All ranks made the same call with the same components.

    PER_GROUP components may be declared by the members of some instances only; those that do
    have the same settings for them.

    Raises:
        DisagreementError: names the field and who said what.
    """
    for name in _JOB_WIDE:
        _same(name, [word[name] for word in words])
    _same("components", [_job_wide_components(word) for word in words])
    _check_settings(words)


def divergences(
    words: Sequence[dict[str, JsonValue]], topology: Topology
) -> tuple[Divergence, ...]:
    """Copies that should be equal and are not, by component."""
    found = []
    for spec, scope in _shared_scopes(words, topology):
        structures, contents, _ = _digests(words, spec, scope)
        union = spec.pattern is SharingPattern.PER_GROUP and len(set(structures)) > 1
        if not union and (len(set(structures)) > 1 or len(set(contents)) > 1):
            found.append(Divergence(component=spec.key, members=scope.writers))
    return tuple(found)


def inventory_versions(words: Sequence[dict[str, JsonValue]], topology: Topology) -> dict[str, str]:
    """For PER_GROUP copies whose members hold different names: a digest of who holds what."""
    versions = {}
    for spec, scope in _shared_scopes(words, topology):
        structures, *_ = _digests(words, spec, scope)
        if len(set(structures)) > 1:
            digest = blake3(dump_json(list(structures))).hexdigest(length=16)
            versions[f"{spec.key}/{scope.label}"] = digest
    return versions


def own_documents(words: Sequence[dict[str, JsonValue]], topology: Topology) -> frozenset[str]:
    """PER_GROUP copies whose members hold different names, and differ in all else as well."""
    found = set()
    for spec, scope in _shared_scopes(words, topology):
        structures, _, documents = _digests(words, spec, scope)
        if len(set(structures)) > 1 and len(set(documents)) > 1:
            found.add(f"{spec.key}/{scope.label}")
    return frozenset(found)


def _shared_scopes(
    words: Sequence[dict[str, JsonValue]], topology: Topology
) -> list[tuple[ComponentSpec, Scope]]:
    """Every copy that several ranks hold, of the components that these ranks declared."""
    keys = [{one.spec.key for one in _declarations(word)} for word in words]
    return [
        (one.spec, scope)
        for one in declared(words)
        for scope in scopes_of(one.spec, topology)
        if len(scope.writers) > 1 and _all_declare(keys, one.spec, scope)
    ]


def _all_declare(keys: Sequence[set[str]], spec: ComponentSpec, scope: Scope) -> bool:
    """Whether the members of a copy declare the component: all of them or none."""
    declares = [spec.key in keys[rank] for rank in scope.writers]
    if any(declares) and not all(declares):
        raise DisagreementError(
            field=f"component {spec.key!r} of {scope.label}",
            values={
                "declared": [r for r, d in zip(scope.writers, declares, strict=True) if d],
                "not declared": [r for r, d in zip(scope.writers, declares, strict=True) if not d],
            },
        )
    return all(declares)


def _declarations(word: dict[str, JsonValue]) -> list[Declared]:
    found = []
    for one in as_list(word["components"]):
        key, pattern, group, level, required, metadata, compression, lossy = as_list(one)
        spec = ComponentSpec(
            key=str(key),
            pattern=SharingPattern(str(pattern)),
            group_name=None if group is None else str(group),
        )
        found.append(
            Declared(
                spec=spec,
                validation=ValidationLevel(str(level)),
                required=bool(required),
                metadata=as_dict(metadata),
                compression=None if compression is None else CompressionLevel(str(compression)),
                is_exact=lossy in (None, _lossy_json(EXACT)),
            )
        )
    return found


def _digests(
    words: Sequence[dict[str, JsonValue]], spec: ComponentSpec, scope: Scope
) -> tuple[list[JsonValue], list[JsonValue], list[JsonValue]]:
    """Of structures, contents and documents, by rank."""
    said = [as_list(as_dict(words[rank]["digests"])[spec.key]) for rank in scope.writers]
    return [one[0] for one in said], [one[1] for one in said], [one[2] for one in said]


def _job_wide_components(word: dict[str, JsonValue]) -> JsonValue:
    return [
        declared
        for declared in as_list(word["components"])
        if as_list(declared)[1] != SharingPattern.PER_GROUP.value
    ]


def _check_settings(words: Sequence[dict[str, JsonValue]]) -> None:
    said: dict[str, dict[str, list[int]]] = {}
    for rank, word in enumerate(words):
        for one in as_list(word["components"]):
            key, *_, compression, lossy = as_list(one)
            text = _settings_text(compression, lossy) or "none of its own"
            said.setdefault(str(key), {}).setdefault(text, []).append(rank)
    for key in sorted(said):
        if len(said[key]) > 1:
            raise DisagreementError(field=f"settings of component {key!r}", values=said[key])


def _same(name: str, values: Sequence[JsonValue]) -> None:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(_text(name, value), []).append(rank)
    if len(ranks) > 1:
        raise DisagreementError(field=name, values=ranks)


def _text(name: str, value: JsonValue) -> str:
    """For people; different for different values."""
    if name != "components":
        return str(value)
    return ", ".join(_declared_text(as_list(one)) for one in as_list(value)) or "none"


def _declared_text(declaration: list[JsonValue]) -> str:
    key, pattern, _, level, required, metadata, compression, lossy = declaration
    more = "" if required else " optional"
    more += f" {dump_json(metadata).decode()}" if metadata else ""
    more += f" {_settings_text(compression, lossy)}"
    return f"{key} {pattern} {level}{more}".rstrip()


def _settings_text(compression: JsonValue, lossy: JsonValue) -> str:
    said = [] if compression is None else [f"compression={compression}"]
    said += [] if lossy is None else [f"lossy={dump_json(lossy).decode()}"]
    return " ".join(said)
