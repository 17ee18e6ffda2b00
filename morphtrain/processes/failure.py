"""One message for what goes wrong in any of several processes: the first failure counts, and rank 0 reports it."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from morphtrain.errors import UserError, said
from morphtrain.processes.place import Place

if TYPE_CHECKING:
    from torch.distributed import Store

KEY = "failure"


class RankFailed(Exception):
    """A process has failed for what is no user's mistake; the message says which, and has its traceback."""


@contextmanager
def told(here: Place, store: Store) -> Iterator[None]:
    """Tell the others of an error within the block, which may only follow from another process's failure.

    Raises:
        UserError: in rank 0, for such a mistake in whichever process has failed first.
        RankFailed: in rank 0, for any other error, with the traceback of the process that has failed first.
        Exception: in the others, what has happened there.
    """
    try:
        yield
    except Exception as error:
        first = _first(here, store, error)
        if here.rank > 0 or isinstance(error, UserError):
            raise
        if not first["mistake"]:
            raise RankFailed(first["text"]) from None
        if first["rank"] == 0:
            raise
        raise UserError(first["text"]) from None


def _first(here: Place, store: Store, error: Exception) -> dict[str, Any]:
    """The first failure of all processes, which may be this one: its rank, and what there is to say."""
    mistake = isinstance(error, (UserError, OSError))
    details = f"rank {here.rank} of {here.size}: {said(error)}\n{''.join(traceback.format_exception(error)).rstrip()}"
    mine = {"rank": here.rank, "mistake": mistake, "text": str(error) if mistake else details}
    try:
        found: dict[str, Any] = json.loads(store.compare_set(KEY, "", json.dumps(mine)))
    except RuntimeError:  # the store is gone, with the process that kept it
        return mine
    return found
