"""A Trainer small enough to test with, which verifies the tying after every step."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import gpt2
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from layer_tying.integrations.trainer import DynamicTyingCallback

STEPS = 12


class Sequences(Dataset):
    """32 sequences that the model can learn: each counts up from its own number."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(8) + index) % 40
        return {"input_ids": ids, "labels": ids}


class Verify(TrainerCallback):
    """After every step: state, storage and optimizer agree."""

    def __init__(self, tying: DynamicTyingCallback, stop_at: int | None = None) -> None:
        self.tying, self.stop_at, self.owners = tying, stop_at, []

    def on_step_end(self, args, state, control, **at_hand):
        dynamic = self.tying.dynamic
        dynamic.layers.verify()
        model = at_hand["model"]
        held = {id(p) for group in at_hand["optimizer"].param_groups for p in group["params"]}
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
        self.owners.append(dynamic.tying.owners)
        if state.global_step == self.stop_at:
            control.should_training_stop = True


def with_dropout() -> transformers.GPT2LMHeadModel:
    model = gpt2()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


def trainer(
    folder: Path,
    callback: DynamicTyingCallback,
    *,
    make=with_dropout,
    model_seed: int = 0,
    stop_at: int | None = None,
    **changes,
) -> Trainer:
    torch.manual_seed(model_seed)
    model = make()
    settings = {
        **{"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4},
        **{"use_cpu": True, "disable_tqdm": True, "report_to": [], "learning_rate": 1e-2},
        **{"logging_steps": 1, "save_steps": 5, "eval_steps": 3, "seed": 7},
    }
    data = changes.pop("train_dataset", Sequences())
    return Trainer(
        model,
        TrainingArguments(**(settings | changes)),
        train_dataset=data,
        eval_dataset=Sequences(),
        callbacks=[callback, Verify(callback, stop_at)],
    )


def callback(**changes) -> DynamicTyingCallback:
    return DynamicTyingCallback(**({"policy": "dqn", "every": 2} | changes))


def history(run: Trainer) -> list[dict[str, Any]]:
    """All that is logged but times, and the run's name."""
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "step")
    kept += (
        "tying",
        "tying_previous_reward",
        "tying_reward",
        "tying_epsilon",
        "independent_layers",
    )
    entries = [{key: entry.get(key) for key in kept} for entry in run.state.log_history]
    return [entry for entry in entries if len([v for v in entry.values() if v is not None]) > 1]


def weights(run: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in run.model.named_parameters(remove_duplicate=False)}


def moments(run: Trainer) -> dict[str, dict[str, torch.Tensor]]:
    state = run.optimizer.state
    return {name: state[p] for name, p in run.model.named_parameters()}
