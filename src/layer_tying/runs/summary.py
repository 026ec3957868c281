"""The figures of a run that has ended: ``summary.json``."""

from __future__ import annotations

from typing import Any

from layer_tying.runs import setup
from layer_tying.runs.folder import environment
from layer_tying.runs.memory import model_state
from layer_tying.runs.trainer import Training
from layer_tying.saving import checkpoint

# Scores of the test split that the summary gives under their own names as well.
HEADLINES = (
    "bits_per_byte",
    "last_word_accuracy",
    "accuracy",
    "matthews_correlation",
    "f1",
)


def summarise(training: Training) -> dict[str, Any]:
    """Score the weights that were best on validation, and write the summary.

    The validation split selects; the test split is only reported.
    """
    end = training.layers.tying
    at_end = model_state(training.model, [training.optimizer])
    best = checkpoint.read_checkpoint(training.log.checkpoints / "best")
    training.storage.apply(best.tying)
    best.load_weights(training.model)
    with setup.autocast(training.config, training.accelerator.device):
        validation = training.workload.scores(training.model, "validation")
        test = training.workload.scores(training.model, "test")
    seconds = training.clock.seconds
    in_training = seconds.get("train", 0.0) + seconds.get("decide", 0.0)
    config = training.config
    summary = {
        "policy": config.policy,
        "family": config.family,
        "dataset": config.dataset,
        "seed": config.seed,
        "steps": training.step,
        "tokens": training.tally.tokens,
        "best_step": best.step,
        **{f"validation_{name}": value for name, value in validation.items()},
        **{f"test_{name}": value for name, value in test.items()},
        **{name: test[name] for name in HEADLINES if name in test},
        "num_layers": config.nlayers,
        "independent_layers_end": end.num_independent,
        "owners_end": list(end.owners),
        "owners_best": best.facts["owners"],
        "trainable_parameters_end": at_end.num_trainable,
        "conventional_parameters": _conventional_parameters(training),
        **training.tally.means(),
        "seconds_per_step": seconds.get("train", 0.0) / max(training.step, 1),
        "decision_overhead": seconds.get("decide", 0.0) / max(in_training, 1e-9),
        "seconds": seconds,
        "data": training.workload.facts,
        "config_hash": config.digest,
        **environment(training.accelerator.device),
    }
    training.log.summary(summary)
    return summary


def _conventional_parameters(training: Training) -> int:
    """How many parameters would train if every layer were independent."""
    layers = training.storage
    shared = sum(p.numel() for p in layers.parameters(0).values())
    in_memory = sum(p.numel() for p in training.model.parameters())
    return in_memory + shared * (layers.tying.num_layers - layers.tying.num_independent)
