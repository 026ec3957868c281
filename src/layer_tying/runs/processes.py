"""The one scheduler of child processes: trains many runs, each in a process of its own.

A run in a process of its own has its own peak memory, and its failure is not another's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from layer_tying.errors import InputError
from layer_tying.runs.config import TrainConfig, read_config
from layer_tying.runs.defaults import to_go_on_with
from layer_tying.runs.interrupt import INTERRUPTED, stop_requests
from layer_tying.runs.reading import has_ended

COMMAND = (sys.executable, "-m", "layer_tying", "train")
SECONDS_BETWEEN_LOOKS = 0.1


@dataclass(frozen=True)
class Job:
    """A run to train.

    Attributes:
        config: the run.
        name: what the others call it.
        after: names of jobs that have to end well before this one starts.
        command: that trains it, given flags of `layer-tying train`.
    """

    config: TrainConfig
    name: str
    after: tuple[str, ...] = ()
    command: tuple[str, ...] = COMMAND

    @property
    def is_done(self) -> bool:
        """Whether its run has ended."""
        return has_ended(self.config.folder)


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        code: the exit code: 0 if the run has ended, 130 if it was interrupted; else it failed.
        reason: the signal that killed it, or, where the output was kept, the last line of it.
    """

    code: int
    reason: str = ""


def train_all(
    jobs: Sequence[Job],
    processes: int = 1,
    threads: int | None = None,
    *,
    on_end: Callable[[Job, Ended], None] = lambda job, ended: None,
    resume: bool = False,
    overwrite: bool = False,
    logs: Path | None = None,
    keep_going: bool = False,
) -> dict[str, Ended]:
    """Train runs, several at a time, and wait for them.

    Args:
        jobs: in the order in which they start, as far as ``after`` allows.
        processes: how many train at a time.
        threads: of each process; torch's default if None.
        on_end: told of each job that ends, also of one that had ended before. What it raises is
            raised here, once those that still run have saved and ended.
        resume: go on with runs that are there, and leave alone those that have ended.
        overwrite: replace runs that are there.
        logs: a folder for the output of each, ``NAME.log``; it is shown here if None.
        keep_going: start further jobs after one has failed.

    Returns:
        How each job ended, by its name; without ``keep_going``, those after a failure are missing.

    Raises:
        InputError: before any of them starts, if a run is there that may not be continued or
            replaced, or that is another one, or if no process may train.
        KeyboardInterrupt: on Ctrl-C or SIGTERM, which each child is told of once, after they have
            saved and ended.
    """
    if processes < 1:
        raise InputError(f"processes is {processes}: at least one has to train at a time")
    for job in jobs:
        _check_folder(job, resume, overwrite)
    with tempfile.TemporaryDirectory() as folder, stop_requests() as stop_requested:
        children = _Children(Path(folder), threads, resume, overwrite, logs, on_end)
        try:
            _schedule(list(jobs), children, processes, keep_going, stop_requested)
        except Exception:  # of `on_end`
            children.interrupt()
            children.wait()
            raise
        finally:
            children.kill()
    have_all_ended_well = [ended.code for ended in children.ended.values()] == [0] * len(jobs)
    if stop_requested() and not have_all_ended_well:
        raise KeyboardInterrupt
    return children.ended


def _check_folder(job: Job, resume: bool, overwrite: bool) -> None:
    folder = job.config.folder
    if overwrite or not (folder / "config.json").exists():
        return
    if not resume:
        raise InputError(
            f"{folder} holds a run: go on with --resume, replace it with --overwrite, "
            f"or name another --exp"
        )
    to_go_on_with(read_config(folder), job.config)


def _schedule(
    waiting: list[Job],
    children: _Children,
    processes: int,
    keep_going: bool,
    stop_requested: Callable[[], bool],
) -> None:
    """Start what is ready while there is room, until all have ended or nothing may start."""
    names = {job.name for job in waiting}
    while waiting or children.running:
        if stop_requested():
            waiting.clear()
            children.interrupt()
        if not keep_going and any(ended.code for ended in children.ended.values()):
            waiting.clear()
        for job in list(waiting):
            first = [name for name in job.after if name in names]
            failed = [name for name in first if children.has_failed(name)]
            if failed:
                waiting.remove(job)
                children.end(job, Ended(1, f"{failed[0]} comes first, and failed"))
            elif len(children.running) < processes and children.ended.keys() >= set(first):
                waiting.remove(job)
                children.start(job)
        children.look()
        if children.running:
            time.sleep(SECONDS_BETWEEN_LOOKS)


@dataclass
class _Children:
    """The processes, by the jobs' names."""

    folder: Path  # for their configurations
    threads: int | None
    resume: bool
    overwrite: bool
    logs: Path | None
    on_end: Callable[[Job, Ended], None]
    running: dict[str, tuple[Job, subprocess.Popen[bytes]]] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    interrupted: bool = False

    def start(self, job: Job) -> None:
        """Start a job, unless it was done before."""
        if self.resume and job.is_done:
            self.end(job, Ended(0))
            return
        file = self.folder / f"{len(self.ended) + len(self.running)}.json"
        file.write_text(job.config.to_json(), encoding="utf-8")
        command = [*job.command, "--config", str(file)]
        if self.overwrite:
            command.append("--overwrite")
        elif self.resume and (job.config.folder / "config.json").exists():
            command.append("--resume")
        environment = dict(os.environ)
        if self.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self.threads)
        with ExitStack() as stack:
            output = None
            if self.logs:
                log = self._log_of(job)
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("wb"))
            # In a session of its own, so that it gets Ctrl-C once, from here, whoever this process
            # got it from: the terminal sends it to all processes, `kill` to one.
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
            )
        self.running[job.name] = job, process

    def look(self) -> None:
        """Note which have ended."""
        for name, (job, process) in list(self.running.items()):
            code = process.poll()
            if code is not None:
                del self.running[name]
                if self.interrupted and code == -signal.SIGINT:  # before it could listen
                    code = INTERRUPTED
                self.end(job, Ended(code, self._reason(job, code)))

    def end(self, job: Job, ended: Ended) -> None:
        """Note how a job ended."""
        self.ended[job.name] = ended
        self.on_end(job, ended)

    def has_failed(self, name: str) -> bool:
        """Whether a job has ended, but not well."""
        return name in self.ended and self.ended[name].code != 0

    def interrupt(self) -> None:
        """Tell each child to save and end, once."""
        if not self.interrupted and os.name == "posix":  # elsewhere the console tells them all
            for _, process in self.running.values():
                process.send_signal(signal.SIGINT)
        self.interrupted = True

    def wait(self) -> None:
        """Wait for those that still run."""
        for _, process in self.running.values():
            process.wait()

    def kill(self) -> None:
        """End what still runs, as after a second Ctrl-C."""
        for _, process in self.running.values():
            process.kill()
        self.wait()

    def _log_of(self, job: Job) -> Path:
        assert self.logs is not None
        return self.logs / f"{job.name}.log"

    def _reason(self, job: Job, code: int) -> str:
        if code < 0:
            return f"killed by signal {-code}"
        return self._last_line(job) if code else ""

    def _last_line(self, job: Job) -> str:
        if not self.logs:
            return ""
        text = self._log_of(job).read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1].removeprefix("layer-tying: ") if text else "no output"
