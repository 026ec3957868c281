"""What a run takes from another run (``--from``): its tyings, its settings, its weights.

All of it is taken once, at the start, and kept in the new run's own folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from layer_tying.core.gather import put
from layer_tying.core.tying import Tying
from layer_tying.core.tying_settings import settings_of
from layer_tying.core.untied_copy import untied_copy
from layer_tying.errors import InputError
from layer_tying.runs.config import SHAPE, TrainConfig, read_config
from layer_tying.runs.reading import read_run
from layer_tying.runs.tying_config import TyingConfig
from layer_tying.saving.checkpoint import Checkpoint, read_checkpoint, unique_tensors
from layer_tying.saving.load import load


def settings_from(config: TrainConfig) -> dict[str, Any]:
    """The settings that the run which ``--from`` names decides; none without ``--from``.

    Raises:
        InputError: if there is no such run, or it does not fit.
    """
    if not config.tying.source or config.tying.tyings:
        return {}
    source = Path(config.tying.source)
    if config.data.task:
        _check_same(config, source, SHAPE)
        return _fine_tuning_settings(config.tying.policy, source)
    if config.tying.policy == "recorded":
        _check_same(config, source, ("nlayers", "every"))
        tyings = recorded_tyings(source, config.tying.permute)
    else:
        _check_same(config, source, ("nlayers",))
        tyings = [final_tying(source)]
    return {"tyings": tuple(owners_text(tying) for tying in tyings)}


def _fine_tuning_settings(policy: str, source: Path) -> dict[str, Any]:
    """What fine-tuning takes from a run; a mixture goes on as it is, the others with its tying."""
    best = best_checkpoint(source)
    settings: dict[str, Any] = {
        "tyings": (owners_text(best.tying),),
        "untied": ",".join(best.settings.untied) or None,
    }
    if policy == "mixture":
        if not best.settings.mixes:
            raise InputError(
                f"the layers of {source} do not mix their weights: fine-tune it with another policy"
            )
        return settings | {"residual_scaling": best.settings.residual_scaling}
    if best.settings.mixes and policy != "none":
        raise InputError(
            f"the layers of {source} mix their weights, which no tying can go on from: fine-tune "
            f"it with --tying keep (policy mixture), or none, which gives each layer its own"
        )
    return settings


def owners_text(tying: Tying) -> str:
    """Owners as settings have them: ``0,0,2``."""
    return ",".join(map(str, tying.owners))


def tyings_of(config: TyingConfig) -> list[Tying]:
    """The tyings that were taken from the other run."""
    return [Tying(tuple(map(int, owners.split(",")))) for owners in config.tyings]


def final_tying(source: Path) -> Tying:
    """The tying that a run ended with, or has reached so far."""
    run = read_run(source)
    owners = (run.summary or {}).get("owners_end") or run.decisions[-1]["state"]
    return Tying(tuple(owners))


def recorded_tyings(source: Path, permute: int | None = None) -> list[Tying]:
    """The tying that a run started from, then one for each of its decisions.

    With ``permute``, a seed, they are of permuted layers: layer i has moved to ``places[i]``.

    Raises:
        InputError: if it did not decide.
    """
    run = read_run(source)
    if not run.is_dynamic:
        raise InputError(f"{source} has no decisions to replay: its policy is {run.policy}")
    tyings = [Tying(tuple(line["state"])) for line in run.decisions]
    if permute is None:
        return tyings
    places = np.random.default_rng(permute).permutation(run.num_layers).tolist()
    return [tying.permuted(places) for tying in tyings]


def best_checkpoint(source: Path) -> Checkpoint:
    """The weights of a run that were best on validation, with their tying."""
    return read_checkpoint(source / "checkpoints" / "best")


def load_backbone(source: Path, model: PreTrainedModel) -> None:
    """Copy a language model's best weights into a classifier of its shape, whatever its tying.

    Every layer gets what it computed with there: mixtures and 1/n residual scaling are in it. Where
    the classifier's layers mix as well, they get the shared sets and the coefficients. The
    classifier's head stays as it is.

    Raises:
        InputError: if a weight is missing, or of another shape.
    """
    if settings_of(model).mixes:
        saved = best_checkpoint(source).weights()
    else:
        saved = untied_copy(load(source)).state_dict()
    heads = (f"{model.base_model_prefix}.pooler.",)  # BERT's masked model has none
    for name, tensor in unique_tensors(model).items():
        if not name.startswith(f"{model.base_model_prefix}.") or name.startswith(heads):
            continue
        there = saved.get(name)
        if there is None or there.shape != tensor.shape:
            raise InputError(f"{source} is of another model: its {name} does not fit")
        put(tensor, there)


def _check_same(config: TrainConfig, source: Path, names: tuple[str, ...]) -> None:
    """Check that the other run has these settings in common with this one."""
    ours, theirs = config.flat(), read_config(source).flat()
    for name in names:
        if theirs[name] != ours[name]:
            raise InputError(f"{name} is {ours[name]!r} here, but {theirs[name]!r} in {source}")
