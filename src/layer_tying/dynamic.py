"""Dynamic layer tying in anyone's training loop: two lines.

::

    tying = DynamicTying(model, optimizer)
    ...
    tying.step(loss)   # after optimizer.step()
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layer_tying.core import distributed
from layer_tying.core.averaging import GradientAveraging
from layer_tying.core.layers import Layers
from layer_tying.core.mixtures import check_mixable, refuse_schedulers
from layer_tying.core.parts import settings_of_part
from layer_tying.core.patterns import pattern
from layer_tying.core.tie import tied_layers
from layer_tying.core.tied_layers import Options
from layer_tying.core.tying import Rules, Tying
from layer_tying.core.weight_access import refuse_sharded
from layer_tying.errors import InputError
from layer_tying.models.families import FAMILIES
from layer_tying.policies import make_policy
from layer_tying.policies.base import LARGEST_REWARD, Action, Decision, Policy

if TYPE_CHECKING:
    from typing_extensions import Unpack  # comes with torch


class DynamicTying:
    """A policy that decides, while a model trains, which of its layers share weights.

    Args:
        model: any transformer whose layers are one list of equal blocks.
        optimizer: the model's optimizer (or several); it is kept in step with the tying.
        policy: who decides: a name of ``POLICIES``, or a policy object. ``"dqn"`` is the paper's
            agent, with the paper's start.
        total_steps: the length of the run in optimizer steps, which a policy needs that settles
            before its end (``settles`` between 0 and 1).
        every: k, the number of optimizer steps from one decision to the next.
        initial: the tying to start from; by default the policy chooses, and shared weights are
            scaled as it wants them. The weights of all other layers are dropped. With a
            ``Tying``, or the name of a pattern that needs no number, training continues from the
            present weights: ``"none"`` for a pretrained model that is to be tied, ``"keep"`` for
            the tying that the model already has.
        max_independent: a hard limit on the number of independent layers.
        seed: of a policy that is named.
        options: those of ``TiedLayers``.

    Raises:
        InputError: if the layers cannot be found, or an option does not fit; then nothing has
            changed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        policy: str | Policy = "mixture",
        total_steps: int | None = None,
        *,
        every: int = 50,
        initial: str | Tying | None = None,
        max_independent: int | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        refuse_sharded(model)
        policy = make_policy(policy, seed=seed) if isinstance(policy, str) else policy
        if initial is None and policy.residual_scaling:
            options.setdefault("residual_scaling", policy.residual_scaling)
        wanted, _ = settings_of_part(model, options)
        if wanted.residual_scaling and not wanted.residual_outputs:
            options["residual_outputs"] = _known_residual_outputs(model)
        distributed.check_in_sync(model, distributed.START_ALIKE)
        with tied_layers(model, optimizer, **options) as layers:
            if policy.mixes and not layers.mixtures:
                refuse_schedulers(layers.optimizers)
                layers.settings.but(mixes=True)  # raises before anything has changed
            self._prepare(layers, policy, total_steps, every, max_independent)
            self._start_from(initial)
        if distributed.world_size() > 1:
            self._averaging = GradientAveraging(layers.stack, layers.optimizers)

    @classmethod
    def over(
        cls,
        layers: Layers,
        policy: Policy,
        total_steps: int | None = None,
        *,
        every: int = 50,
        max_independent: int | None = None,
    ) -> DynamicTying:
        """Let a policy decide over layers that are prepared already, from the tying they have."""
        self = cls.__new__(cls)
        self._prepare(layers, policy, total_steps, every, max_independent)
        self._start_from("keep")
        return self

    def _prepare(
        self,
        layers: Layers,
        policy: Policy,
        total_steps: int | None,
        every: int,
        max_independent: int | None,
    ) -> None:
        """Set when there are decisions, and which are allowed; the layers stay as they are."""
        if every < 1:
            raise InputError(f"every is the number of steps between decisions, got {every}")
        self.layers: Layers = layers
        self._averaging: GradientAveraging | None = None
        self.policy = policy
        self.every = every
        self.num_steps = 0
        self._settled_after = math.inf
        if total_steps is not None:
            self._settled_after = math.ceil((1 - policy.settles) * total_steps)
        elif policy.settles == 1.0:
            self._settled_after = 0
        kinds = layers.rules.kinds
        self.rules = Rules(kinds, len(kinds) if max_independent is None else max_independent)
        self._waiting: tuple[Tying, Action, Tying] | None = None  # a decision without its reward
        self._losses: list[Tensor] = []  # of the steps since the last decision

    def _start_from(self, initial: str | Tying | None) -> None:
        """Check the tying to start from, then bring the layers to it."""
        layers, policy = self.layers, self.policy
        start = self._tying_of(initial)
        self.rules.check(start)
        if policy.mixes:
            check_mixable(layers.stack, start.num_independent)
        policy.reset(start, self.rules)
        layers.apply(start)
        if policy.mixes:
            layers.mix()

    def _tying_of(self, initial: str | Tying | None) -> Tying:
        if initial is None:
            return self.policy.start(self.rules)
        if isinstance(initial, Tying):
            return initial
        if initial == "keep":
            return self.layers.tying
        if initial == "all":
            return self.rules.tightest
        return pattern(initial, self.layers.tying.num_layers)

    @property
    def tying(self) -> Tying:
        """The tying in force."""
        return self.layers.tying

    @property
    def decision_is_due(self) -> bool:
        """Whether the next call of ``step`` decides."""
        return self.num_steps < self._settled_after and self.num_steps % self.every == 0

    def no_sync(self) -> AbstractContextManager[None]:
        """Leave gradients as they are in the backward passes within, as DDP's ``no_sync`` does.

        For gradient accumulation on several processes: for all batches but the last.
        """
        return self._averaging.no_sync() if self._averaging else nullcontext()

    def step(
        self, loss: Tensor | float | None = None, reward: Callable[[], float] | None = None
    ) -> Decision | None:
        """Count an optimizer step; on the first and every k-th after it, decide.

        The policy learns from what followed the last decision and the layers are re-tied
        (Algorithm 1, lines 7-27). Call it after ``optimizer.step()``, gradients cleared.

        With several processes, rank 0's action is everyone's and rewards are means over them;
        training losses are averaged when the policy reads them.

        Args:
            loss: the training loss of this step, for a policy that learns from training losses. It
                is detached, and not read before the next decision.
            reward: for a policy that learns from evaluations: measures how well the model does now,
                the higher the better. The paper's is minus the perplexity of one training batch,
                in eval mode and without gradients. Leave it out where it is known only later, and
                give it to ``learn``.

        Returns:
            The decision, or None at a step without one.

        Raises:
            InputError: if the policy needs a loss and there is none, if several processes are in
                the middle of accumulating gradients, or if their weights have drifted apart: the
                gradients of a layer that became independent were not averaged.
        """
        is_due = self.decision_is_due
        if is_due and self._averaging:
            self._averaging.check_averaged()
        self.num_steps += 1
        if self.num_steps > self._settled_after:
            self._losses.clear()
            return None
        if self.policy.reward == "training_loss":
            self._losses.append(_detached(loss, self.policy))
        return self._decide(reward) if is_due else None

    def _decide(self, reward: Callable[[], float] | None) -> Decision:
        distributed.check_in_sync(self.layers.stack.model, distributed.AVERAGE)
        previous_reward, event = self._learn_from_the_last()
        state = self.tying
        action = distributed.from_rank_0(self.policy.act(state))
        next_state = Tying.from_action(action)
        self.rules.check(next_state)
        self.layers.apply(next_state)
        self._waiting = state, action, next_state
        measured = None
        if self.policy.reward is None:
            self.learn(None)
        elif self.policy.reward == "evaluation" and reward is not None:
            measured, event = self.learn(reward())
        return Decision(
            step=self.num_steps,
            action=action,
            state=next_state.owners,
            reward=measured,
            previous_reward=previous_reward,
            event=event,
            statistics=self.policy.statistics(),
        )

    def _learn_from_the_last(self) -> tuple[float | None, str | None]:
        """Learn from the last decision, if it still waits for its reward."""
        if self.policy.reward == "training_loss":
            device = self._losses[-1].device  # those of a resumed run lie on the CPU
            mean = torch.stack([loss.float().to(device) for loss in self._losses]).mean()
            self._losses.clear()
            return self.learn(-float(mean))
        if self._waiting:
            warnings.warn(
                "the policy learns from evaluations, and none came for its last decision: pass "
                "reward=... to step, or call learn(...) before the next one",
                stacklevel=4,
            )
            self.learn(None)
        return None, None

    def learn(self, reward: float | None) -> tuple[float | None, str | None]:
        """Let the policy learn from the reward of the last decision, if that waits for it.

        Args:
            reward: the higher the better; None if there is none to be had.

        Returns:
            The reward that was learned from, or None with what was wrong with it.
        """
        if not self._waiting:
            return None, None
        measured, event = None, None
        if reward is not None:
            value = distributed.mean(float(reward))
            if abs(value) < LARGEST_REWARD:
                measured = value
            else:
                event = f"the reward was {value}: nothing learned"
        state, action, next_state = self._waiting
        self._waiting = None
        self.policy.observe(state, action, measured, next_state)
        return measured, event

    def state_dict(self) -> dict[str, Any]:
        """The pattern, the step and the policy's state: tensors and JSON-able values.

        With several processes it is collective: call it on all of them.
        """
        return {
            "owners": list(self.tying.owners),
            "num_steps": self.num_steps,
            "waiting": self._waiting and [list(self._waiting[1]), list(self._waiting[0].owners)],
            "losses": [distributed.mean(float(loss)) for loss in self._losses],
            "policy_class": type(self.policy).__name__,
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; re-ties the layers.

        The weights and the optimizer's state are the caller's to load, after this: before it, the
        model and the optimizer may have fewer parameters than were saved.

        Raises:
            InputError: if it is the state of another policy, of a model that differs, or of more
                independent layers than are allowed.
        """
        policy_class = type(self.policy).__name__
        if state["policy_class"] != policy_class:
            raise InputError(
                f"the saved state is of another policy, {state['policy_class']}: "
                f"it cannot go on with {policy_class}"
            )
        tying = Tying(tuple(state["owners"]))
        self.rules.check(tying)
        self.layers.apply(tying)
        self.num_steps = state["num_steps"]
        self._waiting = None
        if state["waiting"]:
            action, before = state["waiting"]
            self._waiting = Tying(tuple(before)), tuple(action), Tying.from_action(action)
        self._losses = [torch.tensor(loss) for loss in state["losses"]]
        self.policy.load_state_dict(state["policy"])


def _detached(loss: Tensor | float | None, policy: Policy) -> Tensor:
    if loss is None:
        raise InputError(
            f"the policy {type(policy).__name__} learns from the training losses: "
            f"call step(loss) with the loss of each step"
        )
    return loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss)


def _known_residual_outputs(model: nn.Module) -> Sequence[str]:
    """The modules that write to the residual stream, of a model of transformers that we know."""
    config = getattr(model, "config", None)  # of a model of transformers
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return family.residual_outputs if family else ()
