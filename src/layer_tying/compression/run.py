"""``layer-tying compress``: all the way from a model's folder to a smaller one's.

OUTPUT is an export that ``load`` takes, with a card and a report. OUTPUT/run keeps what it takes to
go on: ``config.json``, ``choice.json`` (what was measured, once), ``metrics.jsonl``, checkpoints
and, at the end, ``summary.json``.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layer_tying.compression import checkpoints, source
from layer_tying.compression.healing import Healing, Progress
from layer_tying.compression.sensitivity import Probe, choose, reading_from
from layer_tying.compression.settings import CHOICE, RUN, CompressConfig, to_go_on_with
from layer_tying.compression.work import Work, work_of
from layer_tying.core import distributed
from layer_tying.core.find import find_layers
from layer_tying.errors import InputError
from layer_tying.events import at
from layer_tying.files import write_text_whole
from layer_tying.runs.config import CONFIG
from layer_tying.runs.devices import make_accelerator
from layer_tying.runs.folder import RunFolder, finite
from layer_tying.runs.interrupt import stop_requests
from layer_tying.runs.precision import usual_precision
from layer_tying.runs.statistics import progress_bar
from layer_tying.runs.summary import environment
from layer_tying.runs.train import Interrupted
from layer_tying.saving import checkpoint
from layer_tying.saving.export import (
    COMPACT,
    DTYPES,
    PLAIN,
    export_compact,
    refuse_other_contents,
)
from layer_tying.saving.load import load
from layer_tying.tasks.base import is_same_data

PARTS = 10  # of a run, each of which ends with a validation and a checkpoint
VALIDATION_BATCHES = 50  # of a validation on the way; those at the start and the end are whole


def compress_run(
    config: CompressConfig, *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Compress as configured, and return the summary that is also written.

    Args:
        config: what is compressed, on which data, into what.
        resume: go on from the newest whole checkpoint in OUTPUT/run.
        overwrite: replace what is already there.

    Raises:
        InputError: if the model, the data, the budget or the folder cannot be used.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    device = make_accelerator().device
    if distributed.world_size() > 1:
        raise InputError("compress runs in one process: start it without a launcher")
    folder = RunFolder(Path(config.output) / RUN)
    if resume:
        config = to_go_on_with(folder.path, config)
    _check_output(Path(config.output), is_known=resume or overwrite)
    teacher, size = source.open_model(Path(config.source))
    teacher = teacher.to(device)  # type: ignore[arg-type]
    config = config.settled(usual_precision(device, teacher.dtype))
    work = work_of(config, folder, teacher, size)
    try:
        folder.hold()
        if not resume:
            folder.start(config, overwrite)
            (folder.path / CHOICE).unlink(missing_ok=True)
        chosen = _chosen(work)
        healing = _healing(work, chosen)
        if resume and checkpoint.has_steps(folder.checkpoints):
            checkpoints.restore(work, healing)
        else:
            healing.start_from(work.probes())
        _heal(work, healing)
        return _finish(work, healing, chosen)
    finally:
        folder.release()


def _check_output(output: Path, is_known: bool) -> None:
    """Check that nothing of somebody else's would be replaced.

    Raises:
        InputError: if the folder holds the weights of a model, a run, or other files that are not
            known to be of a compression.
    """
    refuse_other_contents(output, *PLAIN)
    names = [each.name for each in output.iterdir()] if output.is_dir() else []
    others = [name for name in names if name != RUN and not name.startswith(".")]
    if others and not is_known and not (output / RUN / CONFIG).exists():
        raise InputError(
            f"{output} holds {min(others)}: name a new folder, or one that may be written over, "
            f"with --overwrite"
        )


def _chosen(work: Work) -> dict[str, Any]:
    """The groups and what was measured for them: of ``choice.json``, or measured now."""
    file = work.folder.path / CHOICE
    mark = source.fingerprint(work.teacher)
    if file.is_file():
        chosen = json.loads(file.read_text(encoding="utf-8"))
        if chosen["fingerprint"] != mark:
            raise InputError(f"the weights in {work.config.source} are no longer those of {file}")
        if not is_same_data(chosen.get("data", work.task.facts), work.task.facts):
            raise InputError(f"the data in {work.config.dataset} are no longer those of {file}")
        return chosen
    before = {split: work.scores(work.teacher, split) for split in ("validation", "test")}
    work.clock.lap("validate")
    stack = find_layers(work.teacher)
    probe = Probe(stack, work.probes(), work.outcome_of)
    choice = choose(probe, work.num_groups, work.config.search.groups)
    work.clock.lap("decide")
    with reading_from(stack, choice.reading):
        tied = work.scores(work.teacher, "validation")
    chosen = {
        "fingerprint": mark,
        "data": work.task.facts,
        "seconds": work.clock.seconds["decide"],
        "measurements": probe.count,
        **finite(asdict(choice)),
        "before": before,
        "tied": tied,
    }
    write_text_whole(file, json.dumps(chosen))
    return chosen


def _healing(work: Work, chosen: Mapping[str, Any]) -> Healing:
    torch.manual_seed(work.config.seed)
    return Healing(
        work.teacher,
        copy.deepcopy(work.teacher),
        tuple(chosen["reading"]),
        work.config.optimization,
        work.config.healing,
        outcome_of=work.outcome_of,
    )


def _heal(work: Work, healing: Healing) -> None:
    """Train to the last step, or save and leave when a stop is requested."""
    part = max(1, healing.num_steps // PARTS)
    with (
        progress_bar(Path(work.config.output).name, healing.step, healing.num_steps) as bar,
        stop_requests() as stop_requested,
    ):
        while healing.step < healing.num_steps:
            at("step")
            progress = healing.train_step(next(work.task.batches))
            bar.update()
            is_last, must_stop = healing.step == healing.num_steps, stop_requested()
            if is_last or healing.step % part == 0:
                scores = _log(work, healing, progress)
                bar.set_postfix_str(_shown(progress, scores), refresh=False)
                checkpoints.save(work, healing)
            elif must_stop:
                checkpoints.save(work, healing)
            if must_stop and not is_last:
                raise Interrupted(
                    f"stopped at step {healing.step} of {healing.num_steps}; "
                    f"go on with the same command and --resume"
                )


def _log(work: Work, healing: Healing, progress: Progress) -> dict[str, float]:
    """Validate, and add a line to ``metrics.jsonl``."""
    work.clock.lap("heal")
    scores = work.scores(healing.student, "validation", VALIDATION_BATCHES)
    work.clock.lap("validate")
    healing.check()
    work.folder.metrics(
        step=healing.step,
        seconds=round(work.clock.total, 3),
        divergence=float(progress.divergence),
        loss=_known(progress.loss),
        independent_layers=healing.layers.tying.num_independent,
        **{f"validation_{name}": value for name, value in scores.items()},
    )
    return scores


def _shown(progress: Progress, scores: Mapping[str, float]) -> str:
    loss, perplexity = _known(progress.loss), scores["perplexity"]
    apart = float(progress.divergence)
    return f"divergence {apart:.3f}, loss {loss:.3f}, val. perplexity {perplexity:.2f}"


def _known(loss: Tensor | None) -> float:
    assert loss is not None, "the tasks of the command have labels"
    return float(loss)


def _finish(work: Work, healing: Healing, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Score the student, and write the summary and the export."""
    at("summary")
    config, student = work.config, healing.finished()
    output, dtype = Path(config.output), config.export_dtype
    export_compact(student, output, DTYPES[dtype] if dtype else None)
    written = load(output).to(work.teacher.device) if dtype else student
    after = {split: work.scores(written, split) for split in ("validation", "test")}
    if work.tokenizer:
        work.tokenizer.save(output)
    summary = {
        "source": config.source,
        "model": type(student).__name__,
        "dataset": config.dataset,
        "steps": healing.step,
        "num_layers": healing.layers.tying.num_layers,
        "independent_layers": healing.layers.tying.num_independent,
        "sharing": config.healing.sharing,
        "reading": chosen["reading"],
        "parameters_before": work.size,
        "parameters_after": sum(p.numel() for p in student.parameters()),
        "bytes_after": (output / COMPACT).stat().st_size,
        "before": chosen["before"],
        "tied": chosen["tied"],
        "after": after,
        "seconds_deciding": chosen["seconds"],
        "seconds_healing": work.clock.seconds.get("heal", 0.0),
        "data": work.task.facts,
        **environment(work.teacher.device),
    }
    work.folder.summary(summary)
    return summary
