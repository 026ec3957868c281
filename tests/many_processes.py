"""Functions called on several ranks at once: real processes, real gloo, one start of torch."""

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small_runs import PATIENCE, SERVER


class Died:
    """Stands for the result of a process that ended without one."""


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)},
        **{"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list:
    """What the function returned, or the exception it raised, on each rank; or ``Died``."""
    return on_separate_ranks(world, _in_a_group, function, *arguments)


def on_separate_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list:
    """The same for a function that makes the process group itself, as torchrun's programs do."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            SERVER.Process(
                target=_call,
                args=(Path(folder), rank_environment(rank, world, port), function, arguments),
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        hung = [process for process in processes if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung, "it hangs"
        return [_result(Path(folder) / str(rank)) for rank in range(world)]


def _call(
    folder: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    try:
        result: Any = function(*arguments)
    except Exception as error:
        traceback.print_exc()
        result = error
    (folder / environment["RANK"]).write_bytes(pickle.dumps(result))


def _in_a_group(function: Callable[..., Any], *arguments: Any) -> Any:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    return function(*arguments)


def _result(file: Path) -> Any:
    return pickle.loads(file.read_bytes()) if file.exists() else Died()
