"""Writes a run folder: the configuration, a line a logged step, a line a decision, the summary."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from layer_tying.core.tying import Tying
from layer_tying.data.tokenizer import FOLDER as TOKENIZER
from layer_tying.errors import InputError
from layer_tying.files import write_text_whole
from layer_tying.policies.base import Decision
from layer_tying.runs.config import CONFIG

METRICS, DECISIONS, SUMMARY = "metrics.jsonl", "tying.jsonl", "summary.json"
LOCK = ".lock"


class Written(Protocol):
    """A configuration that is written into a folder."""

    def to_json(self) -> str:
        """It as JSON."""
        ...


class RunFolder:
    """Writes a run folder; a process that does not log (``active=False``) writes nothing."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._active = active
        self._lock = FileLock(path / LOCK)

    def hold(self) -> None:
        """Make the run folder if need be, and keep other runs out of it until ``release``.

        Raises:
            InputError: if it cannot be made, or another run is in progress there.
        """
        if not self._active:
            return
        with _writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.path}: another run is in progress there") from None
        except (OSError, NotImplementedError):  # a file system without locks
            pass

    def release(self) -> None:
        """Let other runs use the folder; the end of the process does so too."""
        self._lock.release()

    def start(self, config: Written, overwrite: bool) -> None:
        """Begin a new run in the folder. What others have put there stays.

        Raises:
            InputError: if it cannot be written, or holds a run that may not be overwritten.
        """
        if not self._active:
            return
        files = [self.path / name for name in (CONFIG, METRICS, DECISIONS, SUMMARY)]
        if any(file.exists() for file in files) and not overwrite:
            raise InputError(
                f"{self.path} holds a run: go on with --resume, replace it with --overwrite, "
                f"or name another folder"
            )
        with _writing(self.path):
            for file in files:
                file.unlink(missing_ok=True)
            for saved in (*checkpoints_in(self.checkpoints), self.path / TOKENIZER):
                shutil.rmtree(saved, ignore_errors=saved.name == TOKENIZER)
        self._write(CONFIG, config.to_json() + "\n")

    def metrics(self, **values: Any) -> None:
        """Add a line to ``metrics.jsonl``."""
        self._append(METRICS, values)

    def decision(self, **values: Any) -> None:
        """Add a line to ``tying.jsonl``."""
        self._append(DECISIONS, values)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all."""
        self._write(SUMMARY, json.dumps(finite(values), indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what came after a step: a run that goes on from there writes it again."""
        if not self._active:
            return
        (self.path / SUMMARY).unlink(missing_ok=True)
        for name in (METRICS, DECISIONS):
            if (self.path / name).exists():
                text = (self.path / name).read_text(encoding="utf-8", errors="replace")
                kept = [line for line in text.splitlines() if _step_of(line) <= step]
                self._write(name, "".join(f"{line}\n" for line in kept))

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if self._active:
            file = self.path / name
            with _writing(file), file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite(values)) + "\n")

    def _write(self, name: str, text: str) -> None:
        if self._active:
            with _writing(self.path / name):
                write_text_whole(self.path / name, text)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def start_line(tying: Tying) -> dict[str, Any]:
    """The first line of ``tying.jsonl``: the tying that the run starts from."""
    return {"step": 0, "action": None, "state": tying.owners, "reward": None, "epsilon": None}


def decision_line(decision: Decision, with_q: bool) -> dict[str, Any]:
    """A line of ``tying.jsonl``; the Q-matrix is large and goes with few of them."""
    line = {
        "step": decision.step,
        "action": decision.action,
        "state": decision.state,
        "reward": decision.reward,
        "epsilon": decision.statistics.get("epsilon"),
    }
    if decision.previous_reward is not None:
        line["previous_reward"] = decision.previous_reward
    if decision.event:
        line["event"] = decision.event
    if with_q and "q" in decision.statistics:
        line["q"] = decision.statistics["q"]
    return line


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, and what a killed save has left of one."""
    ours = ("best", "step-*", ".*.tmp", ".*.old")
    return [each for pattern in ours for each in folder.glob(pattern) if each.is_dir()]


def finite(value: Any) -> Any:
    """Numbers that JSON does not have become null, also within lists and objects."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    """The step of a logged line; infinite if the line is torn."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf
