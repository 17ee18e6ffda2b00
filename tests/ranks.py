"""Functions called in several processes at once that form a group, as those do that train one network together.

in_ranks(2, function, argument)    # -> [what it returned in process 0, in process 1]
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from fork_server import leave, obey
from postgres_server import free_port
from torch import distributed

from morphtrain.processes.place import LOCALHOST, Place

T = TypeVar("T")

# A server that has imported torch forks the processes, which spares each some four seconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "morphtrain.trainer", "hydra.main", "ranks"])


def in_ranks(size: int, function: Callable[..., T], *arguments: Any, timeout: float = 60) -> list[T]:
    """What `function(*arguments)` returns in each of `size` processes of a gloo group, by rank.

    The function is one of a module's top level; arguments and results are pickled. Each process has one thread.

    Raises:
        AssertionError: with the traceback of each process in which it raises, dies, or runs longer than `timeout`
            seconds; the others are killed two seconds later.
    """
    with tempfile.TemporaryDirectory() as directory:
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(size)]
        processes = [
            CONTEXT.Process(target=_rank, args=(Path(directory, "meet"), rank, size, sender, function, arguments))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        try:
            answers = _answers([receiver for receiver, _ in pipes], timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [
        f"rank {rank}: {answers.get(rank, ('', 'no answer'))[1]}" for rank in range(size) if not _done(answers, rank)
    ]
    assert not failures, "\n".join(failures)
    return [answers[rank][1] for rank in range(size)]


def command_in_ranks(
    size: int,
    arguments: Sequence[str],
    directory: Path,
    timeout: float = 60,
    commands: Mapping[int, Sequence[str]] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """What each of `size` processes of `python -m morphtrain.run *arguments` leaves that one launcher starts together.

    As torchrun on one host, but that it is not torchrun that keeps the store.

    Args:
        commands: by rank, what some run instead of `-m morphtrain.run`.
    """
    port = free_port()
    packages = [path for path in sys.path if path]
    with tempfile.TemporaryDirectory() as place:
        files = [[str(Path(place, f"{rank}.{name}")) for name in ("out", "err")] for rank in range(size)]
        processes = []
        for rank, output in enumerate(files):
            env = {**os.environ, **Place(rank, size, rank, size, LOCALHOST, port).environment()}
            command = (commands or {}).get(rank, ("-m", "morphtrain.run"))
            order = {"arguments": [*command, *arguments], "cwd": str(directory), "output": output}
            order |= {"env": env, "timeout": timeout}
            processes.append(CONTEXT.Process(target=_command, args=(order, packages), name="MainProcess"))  # no sweep's
            processes[-1].start()
        for process in processes:
            process.join(timeout + 10)
        found = [[Path(file).read_text() for file in output] for output in files]
    codes = [process.exitcode for process in processes]
    assert None not in codes
    return [subprocess.CompletedProcess(arguments, code or 0, *said) for code, said in zip(codes, found, strict=True)]


def _command(order: dict[str, Any], packages: list[str]) -> None:
    leave(obey(order, packages))


def _done(answers: dict[int, tuple[str, Any]], rank: int) -> bool:
    return answers.get(rank, ("",))[0] == "done"


def _answers(receivers: list[Connection], timeout: float) -> dict[int, tuple[str, Any]]:
    """What the processes send: ("done", result) or ("failed", traceback), by rank."""
    answers: dict[int, tuple[str, Any]] = {}
    end = time.monotonic() + timeout
    while len(answers) < len(receivers) and (left := end - time.monotonic()) > 0:
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in answers]
        for receiver in wait(waiting, left):
            assert isinstance(receiver, Connection)
            rank = receivers.index(receiver)
            try:
                answers[rank] = pickle.loads(receiver.recv_bytes())
            except EOFError:
                answers[rank] = ("failed", "it died")
            if answers[rank][0] == "failed":
                end = min(end, time.monotonic() + 2)
    return answers


def _rank(meet: Path, rank: int, size: int, sender: Connection, function: Callable[..., T], arguments: Any) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        result = function(*arguments)
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
        _send(sender, ("done", result))
    except BaseException:  # noqa: BLE001 - the test is to know of any
        _send(sender, ("failed", traceback.format_exc()))


def _send(sender: Connection, answer: tuple[str, Any]) -> None:
    """Pickled with the values of tensors, which this process would have to stay for if they were shared."""
    sender.send_bytes(pickle.dumps(answer))
