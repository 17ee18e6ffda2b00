"""What ends a run of several processes: reports of what has happened to one of them, and the message they become."""

from __future__ import annotations

import os
import platform
import traceback
from dataclasses import dataclass
from pathlib import Path

from morphtrain.errors import UserError

MOST_LETTERS = 20_000  # of an error's text; its end says the most
RESUME = "the same command with its hydra.run.dir and resume=auto goes on from the last epoch"

# Each kind of report. Those with a number are uncertain: an interruption by the launcher follows a death, and a broken
# connection or an error of torch follows whatever happened to another process. The largest number is the likeliest.
DIED, SILENT, HUNG, STALLED = "died", "silent", "hung", "stalled"
MISTAKE, RAISED, EXITED, MISSING = "mistake", "raised", "exited", "missing"
INTERRUPTED, PERHAPS, LOST = "interrupted", "perhaps", "lost"
UNCERTAIN = {INTERRUPTED: 3, PERHAPS: 2, LOST: 1}
TOLD = (MISTAKE, RAISED, EXITED, PERHAPS, LOST)  # by the process itself

MESSAGES = {
    DIED: "{who} has died without a word: killed, out of memory, or crashed; {resume}",
    SILENT: "{who} has not answered for {seconds:.0f} seconds: stopped, or its host is; {resume}",
    HUNG: "{who} has kept the others waiting for {seconds:.0f} seconds, in {text}; if it was busy there, a larger "
    "process_timeout lets them wait longer; otherwise {resume}",
    STALLED: "{who} and the others have waited for each other for {seconds:.0f} seconds, and nothing arrives: see to "
    "the network between their hosts (GLOO_SOCKET_IFNAME names its interface); then {resume}",
    MISTAKE: "{who}: {text}",
    RAISED: "{text}\n{who} has failed with this error, which ends all processes",
    PERHAPS: "{text}\n{who} has failed with this error, which ends all processes",
    EXITED: "{who} has ended before the others could, with {text}; {resume}",
    MISSING: "{who} has not come within {seconds:.0f} seconds; all processes have to be started",
    LOST: "{who} has lost its connection to the others ({text}); if the network between their hosts is well again, "
    "{resume}",
}


class RankFailed(UserError):
    """A process of a run has failed, and the run has ended in all of them; the message says which and what to do."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a process is: its host, the namespace of its number there, and that number."""

    host: str
    namespace: int
    pid: int

    @classmethod
    def own(cls) -> Whereabouts:
        namespace = Path("/proc/self/ns/pid")  # containers on a host may share its name, and not its processes
        return cls(platform.node(), namespace.stat().st_ino if namespace.exists() else 0, os.getpid())

    def is_beside(self, other: Whereabouts) -> bool:
        """Whether the other's number means the same process here."""
        return (self.host, self.namespace) == (other.host, other.namespace)


@dataclass(frozen=True)
class Report:
    """What has happened to a process.

    Args:
        kind: one of this module's.
        rank: of the process that it has happened to.
        text: an error's, or where the process is.
        number: of the signal that has interrupted it.
        seconds: for how long.
    """

    kind: str
    rank: int
    text: str = ""
    number: int = 0
    seconds: float = 0.0

    @property
    def is_certain(self) -> bool:
        return self.kind not in UNCERTAIN

    def likelier(self, other: Report | None) -> bool:
        """Whether this rather than the other, both uncertain, is what happened first."""
        return other is None or UNCERTAIN[self.kind] > UNCERTAIN[other.kind]

    def message(self, there: Whereabouts | None) -> str:
        """What the user reads; `there` is where the process is, if that is known."""
        who = f"rank {self.rank}" + (f" on {there.host} (process {there.pid})" if there is not None else "")
        return MESSAGES[self.kind].format(who=who, text=self.text, seconds=self.seconds, resume=RESUME)


def of_error(rank: int, error: BaseException) -> Report:
    """What an exception that ends a process means to the others."""
    if isinstance(error, KeyboardInterrupt):
        return Report(INTERRUPTED, rank, number=getattr(error, "number", 2))  # 2: SIGINT, what Python raises it for
    if isinstance(error, SystemExit):
        return Report(EXITED, rank, f"sys.exit({'' if error.code is None else repr(error.code)})")
    if isinstance(error, UserError):
        return Report(MISTAKE, rank, str(error)[-MOST_LETTERS:])
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return Report(MISTAKE, rank, f"{place}{error.strerror or str(error) or type(error).__name__}")
    kind = PERHAPS if isinstance(error, RuntimeError) else RAISED  # torch raises it for broken connections, too
    return Report(kind, rank, "".join(traceback.format_exception(error)).rstrip()[-MOST_LETTERS:])
