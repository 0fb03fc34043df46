"""What a manifest's fields say together, whichever class holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptcoord.core.manifest_laws import step_ref
from ckptcoord.core.refs import BranchName, CheckpointId

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ckptcoord.core.manifest import ComponentManifest
    from ckptcoord.core.plainmanifest import PlainComponent


class ManifestFacts:
    """For a class with the fields of a manifest to inherit from."""

    __slots__ = ()

    if TYPE_CHECKING:  # else pydantic would take them for fields, of this order
        branch: str
        step: int
        parent: str | None
        base: str | None

        @property
        def components(self) -> Mapping[str, ComponentManifest | PlainComponent]:
            """By key, sorted."""

    @property
    def id(self) -> CheckpointId:
        """The checkpoint's id."""
        return CheckpointId(BranchName(self.branch), self.step)

    @property
    def parent_id(self) -> CheckpointId | None:
        """The id that `parent` refers to."""
        return None if self.parent is None else step_ref("parent", self.parent)

    @property
    def base_id(self) -> CheckpointId | None:
        """The id that `base` refers to."""
        return None if self.base is None else step_ref("base", self.base)

    @property
    def size_bytes(self) -> int:
        """Of all components, before any coding."""
        return sum(component.size_bytes for component in self.components.values())

    @property
    def stored_bytes(self) -> int:
        """Of all files."""
        return sum(component.stored_bytes for component in self.components.values())
