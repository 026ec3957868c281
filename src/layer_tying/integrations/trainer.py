"""Dynamic layer tying as a callback of ``transformers.Trainer``.

Facts (transformers 5.23):
- The Trainer loads a checkpoint's weights and its optimizer's state before ``on_train_begin``, and
  no event comes between; no event is told the checkpoint's folder either.
- ``save_pretrained`` refuses a model whose layers share tensors, and an optimizer refuses a state
  of another number of parameters than it was made with.

So the Trainer's own files stay such that it can always load them: ``model.safetensors`` holds a
copy of the weights for each layer (any ``from_pretrained`` loads it), ``optimizer.pt`` the settings
without the optimizer state. What training continues from is in the folder ``layer_tying/``:
each distinct weight once, its optimizer state by name, the tying and the policy.

On several processes (``torchrun``, ``accelerate launch``) the Trainer wraps the model in DDP before
training begins. When it is made, the callback has DDP told to leave the layers' weights alone;
``DynamicTying`` averages their gradients. Rank 0 saves, and a run goes on on any number.
"""

from __future__ import annotations

import uuid
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layer_tying.core import distributed
from layer_tying.core.averaging import are_layers_left_to_us, leave_layers_to_us
from layer_tying.core.find import LayerStack, find_layers, is_mixture
from layer_tying.core.parts import WHICH
from layer_tying.core.weight_access import mixed_or_scaled, weights_as_read
from layer_tying.dynamic import Decision, DynamicTying
from layer_tying.errors import InputError
from layer_tying.integrations.rewards import batch_reward, evaluation_reward, refuse_reward
from layer_tying.integrations.schedule import joining
from layer_tying.policies import make_policy
from layer_tying.policies.base import Policy
from layer_tying.saving import checkpoint, training_state

FOLDER = "layer_tying"  # inside a checkpoint's
READ = "layer_tying.read"  # in a state dict's metadata: its weights are not what layers store


class DynamicTyingCallback(TrainerCallback):
    """Ties and unties a model's layers while a ``Trainer`` trains it::

        Trainer(model, args, train_dataset=..., callbacks=[DynamicTyingCallback()])

    Decisions are logged in ``trainer.state.log_history``, under ``"tying"``. Checkpoints are the
    Trainer's own, with a folder more in each: ``trainer.train(resume_from_checkpoint=True)`` goes
    on exactly. A checkpoint that lies elsewhere than in ``args.output_dir`` is named in
    ``args.resume_from_checkpoint`` as well.

    Args:
        policy: who decides: a name, or a policy object (see ``DynamicTying``).
        every: k, the number of optimizer steps from one decision to the next.
        reward: for policies that learn from evaluations. ``"batch"``: minus the loss of a training
            batch, drawn at random after the decision; ``"eval_loss"``: minus that of the first
            evaluation after it (of several evaluation sets, the first one's).
        options: any other option of ``DynamicTying``, such as ``initial="none"`` to tie down a
            pretrained model.

    Attributes:
        dynamic: the ``DynamicTying`` at work; None before training.

    Raises:
        InputError: if the reward is unknown, or not for this policy; when training starts, if
            something does not fit.
    """

    def __init__(
        self,
        policy: str | Policy = "mixture",
        *,
        every: int = 50,
        reward: Literal["batch", "eval_loss"] = "batch",
        **options: Any,
    ) -> None:
        if reward not in ("batch", "eval_loss"):
            raise InputError(f"reward is 'batch' or 'eval_loss', got {reward!r}")
        self.dynamic: DynamicTying | None = None
        self._reward = reward
        if isinstance(policy, str):
            policy = make_policy(policy, seed=options.pop("seed", 0))
        if reward == "eval_loss" and policy.reward != "evaluation":
            raise InputError(
                f"reward='eval_loss' is for policies that learn from evaluations, such as dqn: "
                f"{type(policy).__name__} does not"
            )
        self._options: dict[str, Any] = {"policy": policy, "every": every, **options}
        self._run = ""  # tells this run's checkpoints from others'
        self._sizes: list[int] = []  # of the optimizer's groups, as it was made
        self._losses: list[Tensor] = []  # of the batches since the last optimizer step
        self._are_shares = False  # of a batch's loss, to be added up, not averaged
        self._hooks: list[Any] = []
        self._is_training = False

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at_hand: Any
    ) -> None:
        """Before the Trainer wraps the model: see to it that DDP leaves the layers to us."""
        if args.world_size > 1:
            which = {k: v for k, v in self._options.items() if k in WHICH}
            leave_layers_to_us(find_layers(at_hand["model"], **which))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at_hand: Any
    ) -> None:
        """Tie the layers: the optimizer exists, and has loaded what the Trainer resumes from."""
        model, optimizer = at_hand["model"], _bare(at_hand["optimizer"])
        _refuse_devices(args, model)
        if self._options["policy"].reward == "evaluation":
            refuse_reward(args, self._reward, at_hand["train_dataloader"])
        is_known = self.dynamic is not None and self.dynamic.layers.stack.model is model
        options = {**self._options}
        if is_known:  # the Trainer trains it once more
            options["initial"] = "keep"
        else:
            self._sizes = [len(group["params"]) for group in optimizer.param_groups]
        saved = _saved_with(args, state)
        if saved:
            options |= _as_saved(saved)
        make = partial(DynamicTying, model, optimizer, total_steps=state.max_steps, **options)
        if self._options["policy"].mixes:
            with joining(optimizer, at_hand["lr_scheduler"]):
                self.dynamic = make()
        else:
            self.dynamic = make()
        if saved:
            self._run = saved.facts["run"]
            training = saved.training_state()
            saved.load_weights(model)
            training_state.load_optimizer_state_by_name(model, optimizer, training["optimizer"])
            self.dynamic.load_state_dict(training["tying"])
            self.dynamic.layers.verify()
        else:
            self._run = distributed.from_rank_0(uuid.uuid4().hex)
            self._log(state, tying=list(self.dynamic.tying.owners), tying_run=self._run)
            if state.best_model_checkpoint:  # of a conventional run, which is tied from here on
                self._log(state, tying_event="the best of the untied model no longer counts")
                state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._attach(model, optimizer)
        self._is_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at_hand: Any
    ) -> None:
        """Decide, where that is due."""
        assert self.dynamic
        measure = partial(batch_reward, args, state, at_hand["model"], at_hand["train_dataloader"])
        reward = measure if self._reward == "batch" else None
        decision = self.dynamic.step(self._loss_of_step(args), reward)
        if decision:
            self._log(state, **_log_entry(decision))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at_hand: Any
    ) -> None:
        """Let the agent learn from the evaluation, if it is to."""
        metrics = {k: v for k, v in at_hand["metrics"].items() if k.startswith("eval_")}
        if not (self._is_training and self._reward == "eval_loss" and metrics):
            return
        assert self.dynamic
        measured, event = self.dynamic.learn(evaluation_reward(metrics))
        if measured is not None or event:
            self._log(state, tying_reward=measured, tying_event=event)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at_hand: Any
    ) -> None:
        """Add what is ours to the checkpoint that the Trainer has just written."""
        assert self.dynamic
        model, optimizer = at_hand["model"], _bare(at_hand["optimizer"])
        save = partial(
            checkpoint.save_checkpoint,
            _folders_of(args, state)[0] / FOLDER,
            model,
            self.dynamic.tying,
            step=state.global_step,
            config={},
            facts={"run": self._run},
            training={
                "optimizer": training_state.optimizer_state_by_name(model, optimizer),
                "tying": self.dynamic.state_dict(),
            },
        )
        distributed.on_rank_0(save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **at_hand: Any
    ) -> None:
        """Where the Trainer has loaded the best weights, give them the tying that they had."""
        assert self.dynamic
        self._is_training = False
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = checkpoint.read_checkpoint(Path(state.best_model_checkpoint) / FOLDER)
            self.dynamic.layers.apply(best.tying)
            best.load_weights(at_hand["model"])
        for hook in self._hooks[2:]:  # with the first two, the model can still be saved
            hook.remove()

    def _log(self, state: TrainerState, **entry: Any) -> None:
        state.log_history.append({**entry, "step": state.global_step})

    def _attach(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Note training losses, and make the state dicts such that the Trainer can save them."""
        assert self.dynamic
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            model.register_state_dict_post_hook(
                partial(_give_each_layer_its_own, self.dynamic.layers.stack)
            ),
            model.register_load_state_dict_pre_hook(_refuse_what_was_read),
            optimizer.register_state_dict_post_hook(partial(_leave_out_state, self._sizes)),
        ]
        if self.dynamic.policy.reward == "training_loss":
            hook = model.register_forward_hook(self._note_loss, with_kwargs=True)
            self._hooks.append(hook)

    def _note_loss(self, model: nn.Module, _: Any, options: dict[str, Any], output: Any) -> None:
        """No event of the Trainer's is told the loss of a step; the model's output has it."""
        if model.training and torch.is_grad_enabled():
            if output.get("loss") is None:
                raise InputError(
                    "the policy learns from training losses, and the model's output has none: "
                    "leave out label_smoothing_factor and compute_loss_func, with which the "
                    "Trainer computes it elsewhere, or take another policy"
                )
            self._losses.append(output["loss"].detach())
            self._are_shares = options.get("num_items_in_batch") is not None

    def _loss_of_step(self, args: TrainingArguments) -> Tensor | None:
        if not self._losses:
            return None
        losses = torch.stack(self._losses)
        self._losses.clear()
        if not self._are_shares:
            return losses.mean()
        of_all_processes = args.world_size if args.average_tokens_across_devices else 1
        return losses.sum() * of_all_processes


def _refuse_devices(args: TrainingArguments, model: nn.Module) -> None:
    if args.n_gpu > 1:
        raise InputError(
            f"the Trainer runs on {args.n_gpu} GPUs in one process, which copies the model at each "
            f"step: start one process a GPU with torchrun or accelerate launch"
        )
    if args.world_size > 1 and not are_layers_left_to_us(model):
        raise InputError(
            "the Trainer has wrapped the model already: give it the callback when it is made, "
            "Trainer(..., callbacks=[...]), not later"
        )


def _bare(optimizer: Optimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _folders_of(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Where the Trainer has its checkpoint of this step; the newest first.

    In a search for hyperparameters each trial has a folder, and callbacks are not told which.
    """
    output, name = Path(str(args.output_dir)), f"checkpoint-{state.global_step}"
    written = output.glob(f"run-*/{name}/trainer_state.json") if state.is_hyper_param_search else ()
    newest_first = sorted(written, key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return [*(file.parent for file in newest_first), output / name]


def _saved_with(args: TrainingArguments, state: TrainerState) -> checkpoint.Checkpoint | None:
    """Our part of the checkpoint that the Trainer resumes from, if it does and has one."""
    runs = [entry["tying_run"] for entry in state.log_history if "tying_run" in entry]
    if not runs:
        return None
    folders = _folders_of(args, state)
    if isinstance(args.resume_from_checkpoint, str):
        folders.insert(0, Path(args.resume_from_checkpoint))
    for folder in folders:
        if (folder / FOLDER).is_dir():
            saved = checkpoint.read_checkpoint(folder / FOLDER)
            if (saved.facts["run"], saved.step) == (runs[-1], state.global_step):
                return saved
    raise InputError(
        f"the run resumed at step {state.global_step} has tied layers, and their state is not in "
        f"{folders[-1] / FOLDER}: name the checkpoint's folder in args.resume_from_checkpoint too, "
        f"or, if it was killed while it saved, resume from the one before"
    )


def _as_saved(saved: checkpoint.Checkpoint) -> dict[str, Any]:
    """The options that the policy chose when the run began."""
    names = ("residual_scaling", "residual_outputs")
    return {"initial": saved.tying, **{name: getattr(saved.settings, name) for name in names}}


def _log_entry(decision: Decision) -> dict[str, Any]:
    return {
        "tying": list(decision.state),
        "tying_reward": decision.reward,
        "tying_previous_reward": decision.previous_reward,
        "tying_event": decision.event,
        "tying_epsilon": decision.statistics.get("epsilon"),
        "independent_layers": len(set(decision.state)),
    }


def _give_each_layer_its_own(
    stack: LayerStack, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Put in a state dict what each layer computes with, as who saves a plain model wants."""
    if any(isinstance(tensor, nn.Parameter) for tensor in state.values()):
        return  # who asks for parameters wants to see which are shared
    metadata[READ] = bool(mixed_or_scaled(model))
    seen: set[int] = set()
    for name, weight in weights_as_read(stack):
        stored = state[prefix + name]
        is_new = weight.data_ptr() != stored.data_ptr() or weight.data_ptr() in seen
        # On the CPU, since the training device may have room for the shared weights only.
        state[prefix + name] = weight.to("cpu", copy=True) if is_new else stored
        seen.add(stored.data_ptr())
    for name in [name for name in state if is_mixture(name, state)]:
        del state[name]


def _refuse_what_was_read(_: nn.Module, __: Any, ___: str, metadata: Any, *____: Any) -> None:
    if metadata.get(READ):
        raise InputError(
            "this state dict holds what each layer of a tied model computes with, mixed and "
            "scaled, not what they store: load it into a model that is not tied. Copies of the "
            "tensors in state_dict(keep_vars=True) are what they store"
        )


def _leave_out_state(sizes: list[int], _: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimizer as it was made, so that one made alike can load it."""
    groups = []
    start = 0
    for size, group in zip(sizes, state["param_groups"], strict=False):  # less coefficients
        kept = {key: value for key, value in group.items() if key != "param_names"}
        groups.append({**kept, "params": list(range(start, start + size))})
        start += size
    return {**state, "state": {}, "param_groups": groups}
