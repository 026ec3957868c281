"""A run in progress: its steps, decisions and validations, as Algorithm 1 has them.

What surrounds them is elsewhere: the order of things in ``train.py``, checkpoints in
``checkpoints.py``, the figures at the end in ``summary.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from layer_tying.core import distributed
from layer_tying.core.averaging import GradientAveraging
from layer_tying.core.frozen_layers import FrozenLayers
from layer_tying.core.gather import whole_on_rank_0
from layer_tying.core.mixtures import FACTOR_KEY
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.data.batches import rows_of_rank
from layer_tying.dynamic import DynamicTying, Layers
from layer_tying.events import at
from layer_tying.models.build import build_model
from layer_tying.models.families import residual_outputs
from layer_tying.policies.base import Policy
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.folder import RunFolder, decision_line
from layer_tying.runs.from_run import load_backbone
from layer_tying.runs.memory import ModelState, model_state, peak_bytes
from layer_tying.runs.optimization import adamw, learning_rate
from layer_tying.runs.precision import autocast, choose_attention
from layer_tying.runs.start import rules_of, starting_point
from layer_tying.runs.statistics import Stopwatch, Tally
from layer_tying.saving import checkpoint, training_state
from layer_tying.tasks.base import Task
from layer_tying.tasks.evaluation import evaluating
from layer_tying.tasks.metrics import perplexity

LOGGED_Q_VALUES = 8  # decisions whose whole Q-matrix is logged, over a run
NO_BEST = {"step": 0, "loss": math.inf}


class Trainer:
    """Everything that Algorithm 1 keeps from step to step.

    Args:
        config: the run, with every default settled (see ``resolve``).
        task: the data and the loss.
        accelerator: the device, and the other processes if there are any.
        folder: what is logged goes there.
    """

    def __init__(
        self, config: TrainConfig, task: Task, accelerator: Accelerator, folder: RunFolder
    ) -> None:
        assert config.optimization.max_steps is not None, "the defaults are not settled"
        self.config = config
        self.task = task
        self.accelerator = accelerator
        self.device: torch.device = accelerator.device
        self.folder = folder
        self.num_steps: int = config.optimization.max_steps
        self.model_config = task.model_config.to_dict()  # as those who use it want it
        torch.manual_seed(config.seed)  # the same weights on all ranks
        self.rules = rules_of(config.tying, task.model_config)
        start, policy = starting_point(config.tying, self.rules, self.num_steps, config.seed)
        self._build_model(start)
        self.optimizer = adamw(self.model, config.optimization)
        self._tie(start)
        self.averaging: GradientAveraging | None = None
        if distributed.world_size() > 1 and not self._is_sharded:
            self.averaging = GradientAveraging(self.storage.stack)
        self.tying = self._put_in_charge(policy) if policy else None
        if config.optimization.compile:
            for block in self.layers.stack.blocks:
                block.compile()
        if distributed.rank():
            torch.manual_seed(config.seed + distributed.rank())  # but not the same dropout
        self.tally = Tally()
        self.clock = Stopwatch(self.device)
        self.state: ModelState | None = None  # what is held; None after it may have changed
        self.losses: list[Tensor] = []  # of the steps since the last logged one
        self.last_loss: Tensor | None = None  # of the newest step
        self.best: dict[str, float] = NO_BEST
        self.validation_perplexity: float | None = None  # none before the first validation

    def _build_model(self, start: Tying) -> None:
        tying, optimization = self.config.tying, self.config.optimization
        in_memory = Tying.independent(start.num_layers) if tying.freezes else start
        self.model = build_model(
            self.task.model_config, in_memory, untied=tying.untied_names, device=self.device
        )
        self.model.config.use_cache = False
        choose_attention(self.model, optimization.precision, self.config.data.bptt)
        if optimization.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self._is_sharded:
            from layer_tying.core.sharding import shard_tied_layers

            shard_tied_layers(TiedLayers(self.model, untied=tying.untied_names))

    @property
    def _is_sharded(self) -> bool:
        """A single process holds all there is."""
        return self.config.optimization.parallel == "shard" and distributed.world_size() > 1

    def _tie(self, start: Tying) -> None:
        tying = self.config.tying
        self.storage = TiedLayers(
            self.model,
            self.optimizer,
            untied=tying.untied_names,
            gradient=tying.gradient,
            optimizer_state=tying.optimizer_state,
            residual_scaling=tying.residual_scaling or 0.0,
            residual_outputs=(
                residual_outputs(self.model.config.model_type) if tying.residual_scaling else ()
            ),
        )
        self.layers: Layers = self.storage
        if tying.freezes:
            self.layers = FrozenLayers(self.storage, start, copies=tying.sharing == "tied")

    def _put_in_charge(self, policy: Policy) -> DynamicTying:
        return DynamicTying.over(
            self.layers,
            policy,
            self.num_steps,
            every=self.config.tying.every,
            max_independent=self.rules.max_independent,
        )

    def load_pretrained(self, source: Path) -> None:
        """Begin with the weights of a run of the same shape (fine-tuning)."""
        load_backbone(source, self.model)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.tally.steps

    def train_step(self) -> Tensor:
        """One optimizer step (Algorithm 1, lines 5-6); its mean loss."""
        at("step")
        settings = self.config.optimization
        rate = learning_rate(settings, self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(FACTOR_KEY, 1.0)
        total = torch.zeros((), device=self.device)
        for number in range(1, settings.accumulate + 1):
            batch, weight = _my_rows(next(self.task.batches))
            with self.autocast():
                loss = self.task.loss(self.model, batch) * (weight / settings.accumulate)
            self._backward(loss, is_last=number == settings.accumulate)
            total += loss.detach()
        at("gradients")
        with distributed.others_may_be_lost() if self._is_sharded else nullcontext():
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self.optimizer.step()
        if self.state is None:
            self.state = model_state(self.model, [self.optimizer])
        self.optimizer.zero_grad()
        tokens = self.task.tokens_per_batch * settings.accumulate
        self.losses.append(total)
        self.last_loss = total
        self.tally.add_step(tokens, self.layers.tying.num_independent, self.state)
        return total

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """Add up gradients; with the last batch, average them over all processes meanwhile."""
        held_back = self.averaging.no_sync() if self.averaging and not is_last else nullcontext()
        with held_back:
            loss.backward()

    def decide(self) -> None:
        """Lines 7-27, where they are due."""
        if self.tying is None:
            return
        if self.tying.decision_is_due:
            self.clock.lap("train")
        index = self.tying.num_steps // self.tying.every
        decision = self.tying.step(self.last_loss, self.reward)
        if decision:
            at("decided")
            spacing = max(1, self.num_steps // self.tying.every // LOGGED_Q_VALUES)
            self.folder.decision(**decision_line(decision, with_q=index % spacing == 0))
            self.state = None
            self.clock.lap("decide")

    def reward(self) -> float:
        """Lines 20-21: minus the (log-)perplexity of a fresh training batch, or the accuracy."""
        at("reward")
        wanted = self.config.tying.reward
        batch, weight = _my_rows(next(self.task.reward_batches))
        with evaluating(self.model), self.autocast():
            if wanted == "accuracy":
                return distributed.mean(weight * self.task.accuracy(self.model, batch))
            loss = distributed.mean(weight * float(self.task.loss(self.model, batch)))
        return -perplexity(loss) if wanted == "perplexity" else -loss

    def validate(self) -> dict[str, float]:
        """Score the validation split, and keep the weights if they are the best so far."""
        at("validate")
        self.clock.lap("train")
        with self.autocast():
            scores = self.task.scores(self.model, "validation", self.config.evaluation.eval_batches)
        self.validation_perplexity = scores["perplexity"]
        if scores["loss"] < self.best["loss"] or not self.best["step"]:
            loss = scores["loss"] if math.isfinite(scores["loss"]) else math.inf
            self.best = {"step": self.step, "loss": loss}
            weights, best = self._weights(), self.folder.checkpoints / "best"
            distributed.on_rank_0(lambda: self.save_weights(best, weights, scores=scores))
        self.clock.lap("validate")
        return scores

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        return autocast(self.config.optimization.precision, self.device)

    def log_step(self, scores: Mapping[str, float]) -> float:
        """Add a line of metrics, with the scores of a validation if there was one.

        Returns:
            The mean loss of the steps since the last line.
        """
        self.clock.lap("train")
        loss = distributed.mean(float(torch.stack(self.losses).mean()))
        self.losses.clear()
        state = self.state or model_state(self.model, [self.optimizer])
        self.tally.peak_memory_bytes = max(self.tally.peak_memory_bytes, peak_bytes(self.device))
        validation = {f"validation_{k}": v for k, v in scores.items() if k != "loss"}
        line = {
            "step": self.step,
            "tokens": self.tally.tokens,
            "seconds": round(self.clock.total, 3),
            "loss": loss,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "independent_layers": self.layers.tying.num_independent,
            "trainable_parameters": state.num_trainable,
            "parameter_bytes": state.parameter_bytes,
            "gradient_bytes": state.gradient_bytes,
            "optimizer_state_bytes": state.optimizer_state_bytes,
            "model_state_bytes": state.total_bytes,
            "peak_memory_bytes": self.tally.peak_memory_bytes,
            **validation,
        }
        self.accelerator.log(line, step=self.step)  # to a tracker, if there is one
        if scores and self.storage.mixtures:
            line["coefficients"] = _rounded(self.storage.mixtures.matrices())
        self.folder.metrics(**line)
        return loss

    def _weights(self) -> dict[str, Tensor]:
        """Each distinct weight; of sharded ones, rank 0 gets copies and the others nothing."""
        return whole_on_rank_0(checkpoint.unique_tensors(self.model))

    def save_weights(
        self, folder: Path, weights: Mapping[str, Tensor], training: Any = None, **facts: Any
    ) -> None:
        """Write a checkpoint of the weights, with what describes it; on one rank only."""
        checkpoint.save_checkpoint(
            folder,
            self.model,
            self.storage.tying,
            step=self.step,
            config=json.loads(self.config.to_json()),
            facts={
                "data": self.task.facts,
                "owners": list(self.layers.tying.owners),
                "model": self.model_config,
                **facts,
            },
            training=training,
            weights=weights,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that going on exactly needs: tensors (not copies) and JSON-able values.

        With several processes it is collective: call it on all of them. Sharded tensors are put
        together for rank 0.
        """
        self.tally.seconds = self.clock.seconds
        optimizer = training_state.optimizer_state_by_name(self.model, self.optimizer)
        return {
            "model": self._weights(),
            "storage": list(self.storage.tying.owners),
            "owners": list(self.layers.tying.owners),
            "optimizer": {name: whole_on_rank_0(state) for name, state in optimizer.items()},
            "tying": self.tying.state_dict() if self.tying else None,
            "batches": self.task.batches.state(),
            "reward_batches": self.task.reward_batches.state(),
            "rng": distributed.gather(training_state.rng_state()),
            "tally": asdict(self.tally),
            "losses": [distributed.mean(float(loss)) for loss in self.losses],
            "best": self.best,
            "validation_perplexity": self.validation_perplexity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned, on as many processes or on others.

        Raises:
            InputError: if it is of another model or policy.
        """
        self.storage.apply(Tying(tuple(state["storage"])))
        checkpoint.load_tensors(self.model, state["model"], self.folder.path)
        self.layers.apply(Tying(tuple(state["owners"])))
        training_state.load_optimizer_state_by_name(self.model, self.optimizer, state["optimizer"])
        if self.tying:
            self.tying.load_state_dict(state["tying"])
        self.layers.verify()
        self.task.batches.restore(state["batches"])
        self.task.reward_batches.restore(state["reward_batches"])
        self.tally = Tally(**state["tally"])
        self.clock.seconds = dict(self.tally.seconds)
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        self.best = dict(state["best"])
        self.validation_perplexity = state["validation_perplexity"]
        self.state = None
        if distributed.rank() < len(state["rng"]):
            training_state.set_rng_state(state["rng"][distributed.rank()])


def _rounded(matrices: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """As much of coefficients as a picture shows."""
    return {
        name: [[round(value, 4) for value in row] for row in matrix.tolist()]
        for name, matrix in matrices.items()
    }


def _my_rows(batch: Any) -> tuple[Any, float]:
    return rows_of_rank(batch, distributed.rank(), distributed.world_size())
