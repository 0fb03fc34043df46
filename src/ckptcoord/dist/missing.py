"""What a checkpoint lacks altogether, said by its name."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptcoord.errors import MissingComponentsError, StateMismatchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ckptcoord.core.context import Anew
    from ckptcoord.core.sharing import StateComponent
    from ckptcoord.repo.repository import Repository


@contextmanager
def naming_missing(
    repository: Repository, ref: str, wanted: Iterable[StateComponent], anew: Anew
) -> Iterator[None]:
    """Around a load: where it is refused, say which components could begin anew. Not collective.

    Args:
        repository: that is loaded from.
        ref: what is loaded.
        wanted: the components that are to be loaded.
        anew: what of the others begins anew.

    Raises:
        MissingComponentsError: some required ones are not in the checkpoint.
        StateMismatchError: all are, and do not fit.
    """
    try:
        yield
    except StateMismatchError as error:
        commit = repository.resolve(ref)
        there = repository.manifest(commit).components
        missing = tuple(one.key for one in wanted if one.required and one.key not in there)
        if not missing:
            raise
        seeded = () if anew.seed is None else ("rng",)
        raise MissingComponentsError(
            ref=commit.checkpoint_id.ref, components=missing, anew=(*anew.resets, *seeded)
        ) from error
