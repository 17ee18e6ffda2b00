"""Which of several processes this one is, and where they meet: what torchrun or Slurm says in the environment.

Light to import, and without torch: every command asks, also those that never train.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from morphtrain.errors import UserError

LOCALHOST = "127.0.0.1"
PORTS = range(10_000, 30_000)  # for jobs of Slurm, below those that systems hand out by themselves
TORCHRUN, SLURM = "torchrun", "srun"


@dataclass(frozen=True)
class Place:
    """One process among several that train together.

    Args:
        rank: its number, from 0; the first one is the run itself, the others follow it.
        size: how many there are.
        local_rank: its number among those of this host.
        local_size: how many of them this host has.
        address: of the host that keeps the store in which they meet.
        port: of the store.
        attempt: how often torchrun has restarted them all.
        agent: whether torchrun keeps the store, rather than rank 0.
        by: what has started them, for messages.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str
    port: int
    attempt: int = 0
    agent: bool = False
    by: str = TORCHRUN

    @property
    def one_host(self) -> bool:
        """Whether all of them are on this host, so that nothing has to be heard outside of it."""
        return self.local_size == self.size

    def environment(self) -> dict[str, str]:
        """The variables by which a process that is started with them finds this place."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
            "TORCHELASTIC_USE_AGENT_STORE": str(self.agent),
        }


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place among those that were started together; None if it is alone.

    Raises:
        UserError: for variables of torchrun's or Slurm's that make no sense.
    """
    found = _of_torchrun(environment) if {"RANK", "WORLD_SIZE"} <= environment.keys() else _of_slurm(environment)
    if found is None:
        return None
    if found.rank >= found.size:
        raise UserError(f"RANK={found.rank}: must be below WORLD_SIZE={found.size}")
    if not 0 < found.port < 2**16:
        raise UserError(f"MASTER_PORT={found.port}: must be from 1 to {2**16 - 1}")
    return found


def is_follower() -> bool:
    """Whether another process than this one is the first."""
    found = place()
    return found is not None and found.rank > 0


def _of_torchrun(environment: Mapping[str, str]) -> Place | None:
    size = _number(environment, "WORLD_SIZE")
    if size == 1:
        return None
    local_size = _number(environment, "LOCAL_WORLD_SIZE", "1")
    agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return Place(
        _number(environment, "RANK"),
        size,
        _number(environment, "LOCAL_RANK", "0"),
        local_size,
        LOCALHOST if local_size == size and not agent else _text(environment, "MASTER_ADDR"),
        _number(environment, "MASTER_PORT"),
        _number(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
        agent,
    )


def _of_slurm(environment: Mapping[str, str]) -> Place | None:
    """The place of a task that srun has started. In a batch script, which is one process, there is no such count."""
    if not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        return None
    size = _number(environment, "SLURM_STEP_NUM_TASKS")
    if size == 1:
        return None
    by_node = _tasks_by_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    node = _number(environment, "SLURM_NODEID", "0")
    if node >= len(by_node):
        raise UserError(f"SLURM_NODEID={node}: must be below {len(by_node)}, the nodes of SLURM_STEP_TASKS_PER_NODE")
    local_size = by_node[node]
    first = _first_host(environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_JOB_NODELIST"))
    step = _number(environment, "SLURM_JOB_ID") + 101 * _number(environment, "SLURM_STEP_ID", "0")
    return Place(
        _number(environment, "SLURM_PROCID"),
        size,
        _number(environment, "SLURM_LOCALID"),
        local_size,
        LOCALHOST if local_size == size else environment.get("MASTER_ADDR", first),
        _number(environment, "MASTER_PORT", str(PORTS[step % len(PORTS)])),
        by=SLURM,
    )


def _text(environment: Mapping[str, str], name: str) -> str:
    if not (text := environment.get(name)):
        raise UserError(f"{name}: missing; it is set with the number of processes, by torchrun or srun")
    return text


def _number(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name) or default or _text(environment, name)
    if not text.isdecimal():
        raise UserError(f"{name}={text}: must be a whole number, as torchrun and srun set it")
    return int(text)


def _tasks_by_node(text: str) -> list[int]:
    """The numbers of tasks of a step's nodes, which Slurm writes as "2(x3),1"."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: "node[01-03,7],other" begins with node01."""
    first = re.match(r"([^,\[]+)(?:\[([^\],-]+))?", nodes)
    if first is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes}: no list of hosts; MASTER_ADDR names the first one")
    return "".join(filter(None, first.groups()))
