"""Runs small enough to test with, and real processes that cost no second start of torch.

Processes are forked from a server that has imported the library once. They can be told to die by
SIGKILL when a named event of ``layer_tying.events`` comes for the n-th time, so a test chooses the
instant and does not race for it.
"""

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from layer_tying import events
from layer_tying.runs.config import TrainConfig

WORDS = ("the", "a", "cat", "dog", "sat", "on", "mat", "and", "ran", "to", "house", "sun", "red")
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ("cli.command", "runs.train", "report", "core.sharding")
SERVER.set_forkserver_preload([*(f"layer_tying.{name}" for name in PRELOADED), "tiny_trainer"])
PATIENCE = 600  # seconds until a process counts as hung, however busy the machine is
NOT_REPEATABLE = ("seconds", "peak_memory_bytes")  # of metrics.jsonl


def write_text(folder: Path, num_lines: int = 150) -> Path:
    """Lines of twelve words, about 45 characters each; the same in every test."""
    rng = random.Random(0)
    lines = (" ".join(rng.choice(WORDS) for _ in range(12)) for _ in range(num_lines))
    file = folder / "text.txt"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def small(folder: Path, **changes: Any) -> TrainConfig:
    """24 steps of a model of three layers on the text in a folder, a decision every fifth."""
    settings: dict[str, Any] = {
        **{"dataset": str(folder / "text.txt"), "output_dir": str(folder / "runs")},
        **{"policy": "dqn"},
        **{"nlayers": 3, "nhead": 2, "emsize": 16, "bptt": 16, "batch_size": 4},
        **{"max_steps": 24, "every": 5, "eval_every": 8, "save_every": 6, "log_every": 4},
        **{"eval_batch_size": 8, "eval_batches": 2, "precision": "fp32"},
    }
    return TrainConfig.from_flat(**(settings | changes))


def in_process(function: Callable[..., Any], *arguments: Any, **options: Any) -> int:
    """Call a function in a process of its own; its exit code, negative for a signal."""
    process = SERVER.Process(target=function, args=arguments, kwargs=options)
    process.start()
    return _exit_code(process)


def _exit_code(process: Any) -> int:
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("it hangs")
    return process.exitcode


def trainer_of(config: TrainConfig) -> Any:
    """A trainer before its first step; its folder is not made yet."""
    from layer_tying.runs.devices import make_accelerator
    from layer_tying.runs.folder import RunFolder
    from layer_tying.runs.resolve import resolve
    from layer_tying.runs.trainer import Trainer

    accelerator = make_accelerator()
    resolved, task = resolve(config, accelerator.device)
    return Trainer(resolved, task, accelerator, RunFolder(resolved.folder))


def at_event(event: str, number: int, act: Callable[[], object]) -> None:
    """Do something when an event comes for the n-th time."""
    seen = 0

    def count(name: str) -> None:
        nonlocal seen
        seen += name == event
        if name == event and seen == number:
            act()

    events.subscribe(count)


def signal_at(event: str, number: int, signal_number: int) -> None:
    """Send this process a signal when an event comes for the n-th time."""
    at_event(event, number, lambda: signal.raise_signal(signal_number))  # delivered on return


def train_until(
    config: TrainConfig, event: str, number: int, signal_number: int, resume: bool = False
) -> None:
    """Train, and send this process a signal when an event comes for the n-th time."""
    from layer_tying.runs.train import Interrupted, train

    signal_at(event, number, signal_number)
    try:
        train(config, resume=resume)
    except Interrupted:
        sys.exit(130)


def killed_at(config: TrainConfig, event: str, number: int, resume: bool = False) -> None:
    """Train in a process that is killed by SIGKILL when an event comes for the n-th time."""
    code = in_process(train_until, config, event, number, signal.SIGKILL, resume=resume)
    assert code == -signal.SIGKILL, f"it was to be killed, but ended with {code}"


class Crash(Exception):
    """What ends a run that ``crashed_at`` a step."""


def crashed_at(config: TrainConfig, step: int) -> None:
    """Train in this process up to an exception at the n-th step: cheaper than a process."""
    from layer_tying.runs.train import train

    def crash() -> None:
        raise Crash

    at_event("step", step, crash)
    try:
        with suppress(Crash):
            train(config)
    finally:
        events.subscribe(None)
    assert not (config.folder / "summary.json").exists(), "it was to crash, but ended"


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def traces_of(folder: Path) -> dict[str, Any]:
    """All that two runs of one configuration must have in common, to the last bit."""
    metrics = lines_of(folder / "metrics.jsonl")
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    return {
        "metrics": [
            {key: value for key, value in line.items() if key not in NOT_REPEATABLE}
            for line in metrics
        ],
        "decisions": lines_of(folder / "tying.jsonl"),
        "checkpoints": checkpoints,
        **{
            f"{name}/{file}": {
                key: tensor.tolist()
                for key, tensor in load_file(folder / "checkpoints" / name / file).items()
            }
            for name in checkpoints
            for file in ("model.safetensors", "training.safetensors")
        },
    }


class Command:
    """The command in a process of its own, started in a folder that its output goes to.

    With ``hold_at``, an event and a number, it waits there until it is sent a signal. ``train``
    leaves out its report, which takes longer than such a small run, unless ``draws`` is set.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        file_limit: int = -1,
        hold_at: tuple[str, int] | None = None,
        draws: bool = False,
    ) -> None:
        self._output = cwd / "stdout", cwd / "stderr"
        self._pipe, its_end = SERVER.Pipe()
        hold = (*hold_at, its_end) if hold_at else None
        options = arguments, cwd, self._output, file_limit, hold
        self.process = SERVER.Process(target=_command, args=options, kwargs={"draws": draws})
        self.process.start()
        its_end.close()

    def send(self, signal_number: int) -> None:
        """Send a signal where the process is held, and let it go on."""
        ready = wait([self._pipe, self.process.sentinel], PATIENCE)
        assert self._pipe in ready and self.process.pid, "it did not get to where it is held"
        self._pipe.recv()
        os.kill(self.process.pid, signal_number)
        self._pipe.send("go on")

    def ended(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, standard output and error."""
        out, err = self._output
        return _exit_code(self.process), out.read_text("utf-8"), err.read_text("utf-8")


def run_command(*arguments: str, cwd: Path, **options: Any) -> tuple[int, str, str]:
    """Run the command in a process of its own: its exit code, standard output and error."""
    return Command(*arguments, cwd=cwd, **options).ended()


def _command(
    arguments: tuple[str, ...],
    cwd: Path,
    output: tuple[Path, Path],
    file_limit: int,
    hold: tuple[str, int, Connection] | None,
    *,
    draws: bool,
) -> None:
    from layer_tying import report
    from layer_tying.cli import main

    for number, file in enumerate(output, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, -1))
    if hold:
        function, call, pipe = hold
        at_event(function, call, lambda: (pipe.send("held"), pipe.recv()))
    if arguments[:1] == ("train",) and not draws:
        report.write_report = lambda paths, output: []
    sys.exit(main(arguments))
