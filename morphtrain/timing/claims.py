"""Which run uses which devices and cores on this host: one file per run, locked while the run's process lives.

The kernel releases a lock when its process ends, for whatever reason, so dead processes hold no claims. All processes
of a user on a host see each other's claims, however they were started, if they share the directory for temporary files.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from morphtrain.errors import UserError, first_line
from morphtrain.files import file_lock, give_back_lock, is_locked, take_lock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Use:
    """What a living process has claimed: names of devices and cores."""

    pid: int
    resources: tuple[str, ...]


class Claim:
    """What a process of a run has claimed, until `release` or the end of the process.

    Args:
        mates: ids of the other processes of the run.
    """

    def __init__(
        self, claims: Claims, path: Path, lock: int, resources: tuple[str, ...], mates: Set[int] = frozenset()
    ) -> None:
        self.claims, self.path, self.resources, self.mates = claims, path, resources, mates
        self.lock = lock

    def others(self) -> list[int]:
        """The ids of processes of other runs that have claimed any of the same resources."""
        return [pid for pid in self._users() if pid not in self.mates]

    def beside(self) -> frozenset[int]:
        """The ids of those processes of the same run that have."""
        return frozenset(self._users()) & self.mates

    def _users(self) -> list[int]:
        if not self.path.exists():
            self.claims.renew(self)
        mine = set(self.resources)
        return [use.pid for use in self.claims.uses(but=self) if mine & set(use.resources)]

    def release(self) -> None:
        """Give up all claimed resources."""
        with self.claims.alone():
            self.path.unlink(missing_ok=True)
            give_back_lock(self.lock)


class Claims:
    """The claims of all runs that share `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def claim(self, choose: Callable[[Sequence[Use]], tuple[str, ...]], mates: Set[int] = frozenset()) -> Claim:
        """Claim the resources that `choose` returns, given what is in use; no one else can claim anything meanwhile.

        Resources already in use are claimed too. If `choose` raises, nothing is claimed. `mates`: see `Claim`.
        """
        with self.alone():
            resources = choose(self._living(None))
            return Claim(self, *self._written(resources), resources, mates)

    def renew(self, claim: Claim) -> None:
        """Write a claim again whose file is gone: what cleans up temporary files knows no locks."""
        with self.alone():
            give_back_lock(claim.lock)
            claim.path, claim.lock = self._written(claim.resources)

    def _written(self, resources: tuple[str, ...]) -> tuple[Path, int]:
        """The file of a new claim, and its lock."""
        descriptor, name = tempfile.mkstemp(suffix=".claim", dir=self.directory)
        os.close(descriptor)
        path = Path(name)
        lock = take_lock(path)
        path.write_text(json.dumps({"pid": os.getpid(), "resources": resources}))
        return path, lock

    def uses(self, but: Claim | None = None) -> list[Use]:
        """The claims of all living processes, except the claim `but`."""
        with self.alone():
            return self._living(but)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep all others from reading or changing claims during the block. Do not nest it."""
        _make_private(self.directory)
        with file_lock(self.directory / "lock"):
            yield

    def _living(self, but: Claim | None) -> list[Use]:
        """The claims in locked files. Unlocked files belong to processes that were killed, and are removed."""
        living = []
        for path in sorted(self.directory.glob("*.claim")):
            if but is not None and path == but.path:
                continue
            if not is_locked(path):
                path.unlink()
            elif (use := _read(path)) is not None:
                living.append(use)
        return living


def shared_claims() -> Claims:
    """The claims of this user on this host.

    Raises:
        UserError: if the directory for claims belongs to another user.
    """
    directory = Path(tempfile.gettempdir()) / f"morphtrain-{os.getuid()}"
    _make_private(directory)
    return Claims(directory)


def _make_private(directory: Path) -> None:
    directory.mkdir(mode=0o700, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise UserError(f"TMPDIR={directory.parent}: {directory} belongs to another user; choose another TMPDIR")


def _read(path: Path) -> Use | None:
    """The claim in a file; None, with a warning once, if that is none."""
    try:
        content = json.loads(path.read_text())
        return Use(int(content["pid"]), tuple(map(str, content["resources"])))
    except (ValueError, TypeError, KeyError) as error:
        if path not in _unreadable:
            log.warning("%s: no claim of a run, and left out: %s", path, first_line(error))
        _unreadable.add(path)
    return None


_unreadable: set[Path] = set()
