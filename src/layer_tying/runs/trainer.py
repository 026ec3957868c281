"""A run in progress: its steps, decisions and validations, as Algorithm 1 has them.

What surrounds them is elsewhere: the order of things in ``train.py``, going on exactly in
``resume.py``, the figures at the end in ``summary.py``.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator

from layer_tying.core import distributed
from layer_tying.core.find import find_layers
from layer_tying.core.frozen_layers import FrozenLayers
from layer_tying.core.residual_scale import divide_initial_weights
from layer_tying.core.tied_layers import TiedLayers
from layer_tying.core.tying import Tying
from layer_tying.data.batches import rows_of_rank
from layer_tying.dynamic import DynamicTying, Layers
from layer_tying.models.build import build_model
from layer_tying.models.families import residual_outputs
from layer_tying.policies.base import Policy
from layer_tying.runs import setup
from layer_tying.runs.config import TrainConfig
from layer_tying.runs.folder import RunLog, decision_line
from layer_tying.runs.memory import ModelState, model_state, peak_bytes
from layer_tying.runs.source import best_checkpoint, load_backbone
from layer_tying.runs.statistics import Stopwatch, Tally
from layer_tying.runs.tasks import task_of
from layer_tying.saving import checkpoint
from layer_tying.tasks.evaluation import evaluating
from layer_tying.tasks.metrics import perplexity

LOGGED_Q_VALUES = 8  # decisions whose whole Q-matrix is logged, over a run


class Training:
    """What Algorithm 1 keeps from step to step, and its parts."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, log: RunLog) -> None:
        self.config = config
        self.accelerator = accelerator
        self.log = log
        self.workload = task_of(config)
        batches = self.workload.batches_per_epoch * config.epochs
        self.num_steps = config.max_steps or max(1, batches // config.accumulate)
        config.check_every(self.num_steps)
        self.eval_every = config.eval_every or max(1, self.num_steps // 10)
        self.save_every = config.save_every or self.eval_every
        self.model_config = self.workload.model_config.to_dict()  # as those who use it want it
        torch.manual_seed(config.seed)  # the same weights on all ranks
        self.rules = setup.rules(config, self.workload.model_config)
        start, policy = setup.starting_point(config, self.num_steps, self.rules)
        setup.check_budget(self.rules, start, policy)
        damped, inherit = setup.sharing(config)
        in_memory = Tying.independent(config.nlayers) if config.freezes else start
        self.model = build_model(
            self.workload.model_config,
            in_memory,
            device=accelerator.device,
        )
        if damped:
            outputs = residual_outputs(self.model.config.model_type)
            divide_initial_weights(find_layers(self.model), start, outputs)
        self.model.config.use_cache = False
        setup.choose_attention(self.model, config)
        if config.task:
            load_backbone(best_checkpoint(config), self.model)
        if config.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = setup.adamw(self.model, config)
        self.storage = TiedLayers(
            self.model,
            self.optimizer,
            gradient=config.gradient,  # type: ignore[arg-type]
            optimizer_state=config.moments,  # type: ignore[arg-type]
            inherit=inherit,
        )
        self.layers: Layers = self.storage
        if config.freezes:
            self.layers = FrozenLayers(self.storage, start, copies=config.sharing == "tied")
        self.tying = self._put_in_charge(policy) if policy else None
        if config.compile:
            for block in self.layers.stack.blocks:
                block.compile()
        if distributed.rank():
            torch.manual_seed(config.seed + distributed.rank())  # but not the same dropout
        self.tally = Tally()
        self.clock = Stopwatch(accelerator.device)
        self.state: ModelState | None = None  # what is held; None after it may have changed
        self.losses: list[torch.Tensor] = []  # of the steps since the last logged one
        self.last_loss: torch.Tensor | None = None  # of the newest step
        self.best: dict[str, float] = {"step": 0, "loss": math.inf}
        self.validation_perplexity = math.nan

    def _put_in_charge(self, policy: Policy) -> DynamicTying:
        return DynamicTying.over(
            self.layers,
            policy,
            self.num_steps,
            every=self.config.every,
            max_independent=self.rules.max_independent,
        )

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.tally.steps

    def train_step(self) -> torch.Tensor:
        """One optimizer step (Algorithm 1, lines 5-6); its mean loss."""
        rate = setup.learning_rate(self.config, self.step, self.num_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.accelerator.device)
        for _ in range(self.config.accumulate):
            batch, weight = _my_rows(next(self.workload.batches))
            with self._autocast():
                loss = self.workload.loss(self.model, batch) * (weight / self.config.accumulate)
            loss.backward()
            total += loss.detach()
        distributed.average_gradients(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        if self.state is None:
            self.state = model_state(self.model, [self.optimizer])
        self.optimizer.zero_grad()
        tokens = self.workload.tokens_per_batch * self.config.accumulate
        self.last_loss = total
        self.tally.add_step(tokens, self.layers.tying.num_independent, self.state)
        return total

    def decide(self) -> None:
        """Lines 7-27, where they are due."""
        if self.tying is None:
            return
        is_due = self.tying.decision_is_due
        index = self.tying.num_steps // self.config.every
        if is_due:
            self.clock.lap("train")
        decision = self.tying.step(self.last_loss, self._reward)
        if decision:
            spacing = max(1, self.num_steps // self.config.every // LOGGED_Q_VALUES)
            self.log.decision(**decision_line(decision, with_q=index % spacing == 0))
            self.state = None
            self.clock.lap("decide")

    def _reward(self) -> float:
        """Lines 20-21: minus the (log-)perplexity of a fresh training batch, or the accuracy."""
        batch, weight = _my_rows(next(self.workload.reward_batches))
        with evaluating(self.model), self._autocast():
            if self.config.reward == "accuracy":
                return distributed.mean(weight * self.workload.accuracy(self.model, batch))
            loss = distributed.mean(weight * float(self.workload.loss(self.model, batch)))
        return -perplexity(loss) if self.config.reward == "perplexity" else -loss

    def validate(self) -> dict[str, float]:
        """Score the validation split, and keep the weights if they are the best so far."""
        self.clock.lap("train")
        with self._autocast():
            scores = self.workload.scores(self.model, "validation", self.config.eval_batches)
        self.validation_perplexity = scores["perplexity"]
        if scores["loss"] < self.best["loss"] or not self.best["step"]:
            loss = scores["loss"] if math.isfinite(scores["loss"]) else math.inf
            self.best = {"step": self.step, "loss": loss}
            distributed.on_rank_0(
                lambda: checkpoint.save_checkpoint(
                    self.log.checkpoints / "best",
                    self.model,
                    self.storage.tying,
                    step=self.step,
                    config=asdict(self.config),
                    facts=self.facts() | {"scores": scores},
                )
            )
        self.clock.lap("validate")
        return scores

    def _autocast(self) -> torch.autocast:
        return setup.autocast(self.config, self.accelerator.device)

    def log_step(self, loss: float, scores: dict[str, float]) -> None:
        """Add a line of metrics, with the scores of a validation if there was one."""
        self.clock.lap("train")
        state = self.state or model_state(self.model, [self.optimizer])
        self.tally.peak_memory_bytes = max(
            self.tally.peak_memory_bytes, peak_bytes(self.accelerator.device)
        )
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
            "moment_bytes": state.moment_bytes,
            "model_state_bytes": state.total_bytes,
            "peak_memory_bytes": self.tally.peak_memory_bytes,
            **validation,
        }
        self.log.metrics(**line)
        self.accelerator.log(line, step=self.step)  # to a tracker, if there is one

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of itself: its data, and the tying as the policy sees it."""
        return {
            "data": self.workload.facts,
            "owners": list(self.layers.tying.owners),
            "model": self.model_config,
        }


def _my_rows(batch: Any) -> tuple[Any, float]:
    return rows_of_rank(batch, distributed.rank(), distributed.world_size())
