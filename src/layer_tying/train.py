"""The loop of Algorithm 1 on accelerate: trains, decides, validates, saves, and can go on exactly.

A run is a folder: ``config.json``, ``metrics.jsonl`` (a line a logged step), ``tying.jsonl`` (a
line a decision), ``checkpoints/`` and, once it has ended, ``summary.json``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from layer_tying import checkpoint, parallel, setup
from layer_tying.ablations import FrozenLayers
from layer_tying.batches import rows_of_rank
from layer_tying.config import TrainConfig, first_difference
from layer_tying.dynamic import DynamicTying, Layers
from layer_tying.errors import InputError
from layer_tying.evaluate import evaluating, perplexity
from layer_tying.interrupt import stop_requests
from layer_tying.memory import ModelState, model_state, peak_bytes
from layer_tying.models import build_model
from layer_tying.policies import Policy
from layer_tying.runlog import RunLog, decision_line, environment, start_line
from layer_tying.source import best_checkpoint, load_backbone
from layer_tying.surgery import TiedLayers
from layer_tying.tally import Stopwatch, Tally
from layer_tying.tying import Tying
from layer_tying.workload import build_workload

KEPT_CHECKPOINTS = 2
# Scores of the test split that the summary gives under their own names as well.
HEADLINES = (
    "bits_per_byte",
    "last_word_accuracy",
    "accuracy",
    "matthews_correlation",
    "f1",
)
LOGGED_Q_VALUES = 8  # decisions whose whole Q-matrix is logged, over a run


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; the message says how to go on."""


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train as configured and return the summary that is also written to the run folder.

    Args:
        config: what to train.
        resume: go on from the newest whole checkpoint in the run folder.
        overwrite: replace a run that is already in the folder.

    Raises:
        InputError: if the data, the folder or the checkpoint to go on from cannot be used.
        Interrupted: on Ctrl-C or SIGTERM, after saving.
    """
    accelerator = _accelerator(log_with=setup.tracker(config), project_dir=config.folder)
    log = RunLog(config.folder, active=accelerator.is_main_process)
    if config.batch_size % parallel.world_size():
        raise InputError(
            f"batch_size {config.batch_size} is that of all processes together, and not divisible "
            f"by the {parallel.world_size()} there are"
        )
    if resume:
        config = as_it_was(log.config(), config)
    else:
        precision = setup.resolve_precision(config, accelerator.device)
        config = replace(config, precision=parallel.from_rank_0(precision))
    training = Training(config, accelerator, log)  # reads the data: may refuse
    try:
        parallel.on_rank_0(log.hold)
        if resume:
            training.restore()
        else:
            parallel.on_rank_0(lambda: training.start_log(overwrite))
            log.config()  # is the folder in sight of every process?
        with setup.tracking(accelerator, config), stop_requests() as stop_requested:
            training.run(stop_requested)
        return training.finish()
    finally:
        log.release()


def _accelerator(**options: Any) -> Accelerator:
    """The device, and the other processes where a launcher started several."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != parallel.world_size():
        raise InputError(
            f"{launched} processes were launched, but accelerate joins none of them on "
            f"{accelerator.device.type}: launch one, or add --cpu to accelerate launch"
        )
    return accelerator


def as_it_was(saved: TrainConfig, asked: TrainConfig) -> TrainConfig:
    """The configuration to go on with; what was measured at the start is not measured again."""
    if asked.precision == "auto":
        asked = replace(asked, precision=saved.precision)
    if difference := first_difference(saved, asked):
        raise InputError(
            f"cannot resume {saved.folder} with another configuration: {difference} "
            f"(the saved run first)"
        )
    return asked


def measured_precision(config: TrainConfig) -> str:
    """The precision that this machine's device trains the configuration in."""
    return setup.resolve_precision(config, _accelerator().device)


def evaluate_run(folder: Path, split: str, data_dir: str | None = None) -> dict[str, float]:
    """Score a run's best weights.

    Args:
        folder: the run folder.
        split: ``validation`` or ``test``.
        data_dir: where local data sets lie now, if not where they did.

    Raises:
        InputError: if the folder holds no run with a checkpoint, or the data have changed.
    """
    config = RunLog(folder).config()
    best = checkpoint.read_checkpoint(folder / "checkpoints" / "best")
    workload = build_workload(replace(config, data_dir=data_dir or config.data_dir))
    if best.facts["data"] != workload.facts:
        raise InputError(f"cannot evaluate {folder}: the data are not those it trained on")
    model = build_model(workload.model_config, best.tying, device=_accelerator().device)
    best.load_weights(model)
    with setup.autocast(config, model.device):
        return workload.scores(model, split)


def _my_rows(batch: Any) -> tuple[Any, float]:
    return rows_of_rank(batch, parallel.rank(), parallel.world_size())


class Training:
    """A run in progress: what Algorithm 1 keeps from step to step."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, log: RunLog) -> None:
        self.config = config
        self.accelerator = accelerator
        self.log = log
        self.workload = build_workload(config)
        batches = self.workload.batches_per_epoch * config.epochs
        self.num_steps = config.max_steps or max(1, batches // config.accumulate)
        config.check_every(self.num_steps)
        self.eval_every = config.eval_every or max(1, self.num_steps // 10)
        self.save_every = config.save_every or self.eval_every
        self.model_config = self.workload.model_config.to_dict()  # as those who use it want it
        torch.manual_seed(config.seed)  # the same weights on all ranks
        start, policy = setup.starting_point(config, self.num_steps)
        self.rules = setup.rules(config, self.workload.model_config)
        setup.check_budget(self.rules, start, policy)
        in_memory = Tying.independent(config.nlayers) if config.freezes else start
        self.model = build_model(self.workload.model_config, in_memory, device=accelerator.device)
        self.model.config.use_cache = False
        if config.task:
            load_backbone(best_checkpoint(config), self.model)
        if config.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = setup.adamw(self.model, config)
        self.storage = TiedLayers(
            self.model,
            self.optimizer,
            gradient=config.gradient,  # type: ignore[arg-type]
            moments=config.moments,  # type: ignore[arg-type]
        )
        self.layers: Layers = self.storage
        if config.freezes:
            self.layers = FrozenLayers(self.storage, start, copies=config.sharing == "tied")
        self.tying = self._put_in_charge(policy) if policy else None
        if config.compile:
            for block in self.layers.stack.blocks:
                block.compile()
        if parallel.rank():
            torch.manual_seed(config.seed + parallel.rank())  # but not the same dropout
        self.tally = Tally()
        self.clock = Stopwatch(accelerator.device)
        self.state: ModelState | None = None  # what is held; None after it may have changed
        self.losses: list[torch.Tensor] = []  # of the steps since the last logged one
        self.best: dict[str, float] = {"step": 0, "loss": math.inf}
        self.validation_perplexity = math.nan

    def _put_in_charge(self, policy: Policy) -> DynamicTying:
        return DynamicTying(
            self.model,
            self.optimizer,
            every=self.config.every,
            policy=policy,
            initial="keep",
            max_independent=self.rules.max_independent,
            layers=self.layers,
        )

    def start_log(self, overwrite: bool) -> None:
        """Make the run folder.

        Raises:
            InputError: if it cannot be made, or holds a run that may not be overwritten.
        """
        self.log.start(self.config, overwrite)
        self._begin_log()

    def _begin_log(self) -> None:
        self.log.rewind(-1)
        self.workload.save(self.log.folder)
        self.log.decision(**start_line(self.layers.tying))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.tally.steps

    def run(self, stop_requested: Callable[[], bool]) -> None:
        """Train to the last step, or save and leave when a stop is requested."""
        self.model.train()
        self.clock.lap("prepare")
        with self._progress_bar() as bar:
            while self.step < self.num_steps:
                self.losses.append(self._train_step())
                self._decide()
                is_last = self.step == self.num_steps
                scores = self._validate() if is_last or self.step % self.eval_every == 0 else {}
                if scores or self.step % self.config.log_every == 0:
                    loss = parallel.mean(float(torch.stack(self.losses).mean()))
                    self.losses.clear()
                    self._log_step(loss, scores)
                    self._show(bar, loss)
                bar.update()
                must_stop = parallel.any_rank(stop_requested())
                if is_last or must_stop or self.step % self.save_every == 0:
                    self._save()
                if must_stop and not is_last:
                    raise Interrupted(
                        f"stopped at step {self.step} of {self.num_steps}; "
                        f"go on with the same command and --resume"
                    )

    def _train_step(self) -> torch.Tensor:
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
        parallel.average_gradients(self.model.parameters())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        if self.state is None:
            self.state = model_state(self.model, [self.optimizer])
        self.optimizer.zero_grad()
        tokens = self.workload.tokens_per_batch * self.config.accumulate
        self.tally.add_step(tokens, self.layers.tying.num_independent, self.state)
        return total

    def _decide(self) -> None:
        """Lines 7-27, where they are due."""
        if self.tying is None:
            return
        if not self.tying.decision_is_due:
            self.tying.step(self._reward)
            return
        self.clock.lap("train")
        index = self.tying.num_steps // self.config.every
        decision = self.tying.step(self._reward)
        assert decision is not None
        spacing = max(1, self.num_steps // self.config.every // LOGGED_Q_VALUES)
        self.log.decision(**decision_line(decision, with_q=index % spacing == 0))
        self.state = None
        self.clock.lap("decide")

    def _reward(self) -> float:
        """Lines 20-21: minus the (log-)perplexity of a fresh training batch, or the accuracy."""
        batch, weight = _my_rows(next(self.workload.reward_batches))
        with evaluating(self.model), self._autocast():
            if self.config.reward == "accuracy":
                return parallel.mean(weight * self.workload.accuracy(self.model, batch))
            loss = parallel.mean(weight * float(self.workload.loss(self.model, batch)))
        return -perplexity(loss) if self.config.reward == "perplexity" else -loss

    def _validate(self) -> dict[str, float]:
        """Score the validation split, and keep the weights if they are the best so far."""
        self.clock.lap("train")
        with self._autocast():
            scores = self.workload.scores(self.model, "validation", self.config.eval_batches)
        self.validation_perplexity = scores["perplexity"]
        if scores["loss"] < self.best["loss"] or not self.best["step"]:
            loss = scores["loss"] if math.isfinite(scores["loss"]) else math.inf
            self.best = {"step": self.step, "loss": loss}
            parallel.on_rank_0(
                lambda: checkpoint.save_checkpoint(
                    self.log.checkpoints / "best",
                    self.model,
                    self.storage.tying,
                    step=self.step,
                    config=asdict(self.config),
                    facts=self._facts() | {"scores": scores},
                )
            )
        self.clock.lap("validate")
        return scores

    def _autocast(self) -> torch.autocast:
        return setup.autocast(self.config, self.accelerator.device)

    # What is shown and logged

    def _progress_bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.num_steps,
            initial=self.step,
            desc=self.config.exp,
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 15,
            bar_format="{desc} {percentage:3.0f}%|{bar:20}| {n}/{total}{postfix}, {remaining} left",
        )

    def _show(self, bar: tqdm[Any], loss: float) -> None:
        bar.set_postfix_str(
            f"loss {loss:.3f}, val. perplexity {self.validation_perplexity:.2f}, "
            f"{self.layers.tying.num_independent}/{self.config.nlayers} layers",
            refresh=False,
        )

    def _log_step(self, loss: float, scores: dict[str, float]) -> None:
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

    # Saving, going on, ending

    def _save(self) -> None:
        self.clock.lap("train")
        self.tally.seconds = self.clock.seconds
        rng = parallel.gather(checkpoint.rng_state())
        losses = [parallel.mean(float(loss)) for loss in self.losses]
        parallel.on_rank_0(lambda: self._write_checkpoint(rng, losses))
        self.clock.lap("save")

    def _write_checkpoint(self, rng: list[dict[str, Any]], losses: list[float]) -> None:
        checkpoint.save_checkpoint(
            checkpoint.step_folder(self.log.checkpoints, self.step),
            self.model,
            self.storage.tying,
            step=self.step,
            config=asdict(self.config),
            facts=self._facts(),
            training={
                "moments": checkpoint.moments_by_name(self.model, self.optimizer),
                "tying": self.tying.state_dict() if self.tying else None,
                "batches": self.workload.batches.state(),
                "reward_batches": self.workload.reward_batches.state(),
                "rng": rng,
                "tally": asdict(self.tally),
                "losses": losses,
                "best": self.best,
                "validation_perplexity": self.validation_perplexity,
            },
        )
        checkpoint.keep_newest(self.log.checkpoints, KEPT_CHECKPOINTS)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says of itself: its data, and the tying as the policy sees it."""
        return {
            "data": self.workload.facts,
            "owners": list(self.layers.tying.owners),
            "model": self.model_config,
        }

    def restore(self) -> None:
        """Go on from the newest whole checkpoint, exactly; without any, from the start."""
        if not checkpoint.has_steps(self.log.checkpoints):
            parallel.on_rank_0(self._begin_log)
            return
        saved, problems = checkpoint.newest_checkpoint(self.log.checkpoints)
        for problem in problems if self.accelerator.is_main_process else ():
            print(f"layer-tying: {problem}; going on from {saved.folder.name}", file=sys.stderr)
        its_config = TrainConfig.from_json(json.dumps(saved.config))
        if difference := first_difference(its_config, self.config):
            raise InputError(f"cannot resume: {saved.folder} is of another run: {difference}")
        if saved.facts["data"] != self.workload.facts:
            raise InputError(f"cannot resume {saved.folder}: the data are not those it trained on")
        state = saved.training_state()
        self.storage.apply(saved.tying)
        saved.load_weights(self.model)
        self.layers.apply(Tying(tuple(saved.facts["owners"])))
        checkpoint.load_moments_by_name(self.model, self.optimizer, state["moments"])
        if self.tying:
            self.tying.load_state_dict(state["tying"])
        self.layers.verify()
        self.workload.batches.restore(state["batches"])
        self.workload.reward_batches.restore(state["reward_batches"])
        self.tally = Tally(**state["tally"])
        self.clock.seconds = dict(self.tally.seconds)
        device = self.accelerator.device
        self.losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
        if checkpoint.is_whole(self.log.checkpoints / "best"):
            self.best = state["best"]
        self.validation_perplexity = state["validation_perplexity"]
        self.log.rewind(self.step)
        if parallel.rank() < len(state["rng"]):
            checkpoint.set_rng_state(state["rng"][parallel.rank()])

    def finish(self) -> dict[str, Any]:
        """Score the weights that were best on validation, and write the summary.

        The validation split selects; the test split is only reported.
        """
        end = self.layers.tying
        at_end = model_state(self.model, [self.optimizer])
        best = checkpoint.read_checkpoint(self.log.checkpoints / "best")
        self.storage.apply(best.tying)
        best.load_weights(self.model)
        with self._autocast():
            validation = self.workload.scores(self.model, "validation")
            test = self.workload.scores(self.model, "test")
        seconds = self.clock.seconds
        in_training = seconds.get("train", 0.0) + seconds.get("decide", 0.0)
        config = self.config
        summary = {
            "policy": config.policy,
            "family": config.family,
            "dataset": config.dataset,
            "seed": config.seed,
            "steps": self.step,
            "tokens": self.tally.tokens,
            "best_step": best.step,
            **{f"validation_{name}": value for name, value in validation.items()},
            **{f"test_{name}": value for name, value in test.items()},
            **{name: test[name] for name in HEADLINES if name in test},
            "num_layers": config.nlayers,
            "independent_layers_end": end.num_independent,
            "owners_end": list(end.owners),
            "owners_best": best.facts["owners"],
            "trainable_parameters_end": at_end.num_trainable,
            "conventional_parameters": self._conventional_parameters(),
            **self.tally.means(),
            "seconds_per_step": seconds.get("train", 0.0) / max(self.step, 1),
            "decision_overhead": seconds.get("decide", 0.0) / max(in_training, 1e-9),
            "seconds": seconds,
            "data": self.workload.facts,
            "config_hash": config.digest,
            **environment(self.accelerator.device),
        }
        self.log.summary(summary)
        return summary

    def _conventional_parameters(self) -> int:
        """How many parameters would train if every layer were independent."""
        layers = self.storage
        shared = sum(p.numel() for p in layers.parameters(0).values())
        in_memory = sum(p.numel() for p in self.model.parameters())
        return in_memory + shared * (layers.tying.num_layers - layers.tying.num_independent)
