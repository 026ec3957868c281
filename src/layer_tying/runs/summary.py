"""The figures of a run that has ended: ``summary.json``."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from layer_tying.events import at
from layer_tying.runs.memory import model_state
from layer_tying.runs.trainer import Trainer
from layer_tying.saving import checkpoint
from layer_tying.tasks.metrics import METRICS


def summarise(trainer: Trainer) -> dict[str, Any]:
    """Score the weights that were best on validation, and write the summary.

    The validation split selects; the test split is only reported.
    """
    at("summary")
    end = trainer.layers.tying
    at_end = model_state(trainer.model, [trainer.optimizer])
    best = checkpoint.read_checkpoint(trainer.folder.checkpoints / "best")
    trainer.storage.apply(best.tying)
    best.load_weights(trainer.model)
    with trainer.autocast():
        validation = trainer.task.scores(trainer.model, "validation")
        test = trainer.task.scores(trainer.model, "test")
    config = trainer.config
    summary = {
        "policy": config.tying.policy,
        "family": config.model.family,
        "dataset": config.data.dataset,
        "seed": config.seed,
        "steps": trainer.step,
        "tokens": trainer.tally.tokens,
        "best_step": best.step,
        **{f"validation_{name}": value for name, value in validation.items()},
        **{f"test_{name}": value for name, value in test.items()},
        **{name: test[name] for name, each in METRICS.items() if each.is_headline and name in test},
        "num_layers": end.num_layers,
        "independent_layers_end": end.num_independent,
        "owners_end": list(end.owners),
        "owners_best": best.facts["owners"],
        "trainable_parameters_end": at_end.num_trainable,
        "conventional_parameters": _conventional_parameters(trainer),
        **trainer.tally.means(),
        **_times(trainer.clock.seconds, trainer.step),
        "data": trainer.task.facts,
        "config_hash": config.digest,
        **environment(trainer.device),
    }
    trainer.folder.summary(summary)
    return summary


def environment(device: torch.device) -> dict[str, dict[str, Any]]:
    """The versions and the hardware that a figure was measured with."""
    is_cuda = device.type == "cuda"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    hardware = {
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    return {"versions": versions, "hardware": hardware}


def _times(seconds: dict[str, float], num_steps: int) -> dict[str, Any]:
    in_training = seconds.get("train", 0.0) + seconds.get("decide", 0.0)
    return {
        "seconds_per_step": seconds.get("train", 0.0) / max(num_steps, 1),
        "decision_overhead": seconds.get("decide", 0.0) / max(in_training, 1e-9),
        "seconds": seconds,
    }


def _conventional_parameters(trainer: Trainer) -> int:
    """How many parameters would train if every layer were independent."""
    layers = trainer.storage
    shared = sum(p.numel() for p in layers.parameters(0).values())
    mixtures = sum(p.numel() for p in layers.mixtures or ())
    in_memory = sum(p.numel() for p in trainer.model.parameters()) - mixtures
    return in_memory + shared * (layers.tying.num_layers - layers.tying.num_independent)


def _processor() -> str:
    """The name of the processor, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
