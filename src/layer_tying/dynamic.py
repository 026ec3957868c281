"""Dynamic layer tying in anyone's training loop: two lines.

::

    tying = DynamicTying(model, optimizer, every=50)
    ...
    tying.step(reward=lambda: -evaluate_loss(model))   # after optimizer.step()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import nn
from torch.optim import Optimizer

from layer_tying.core import distributed
from layer_tying.core.find import LayerStack
from layer_tying.core.tied_layers import Parameters, TiedLayers, listed
from layer_tying.core.tying import Rules, Tying
from layer_tying.errors import InputError
from layer_tying.policies.bandit import Bandit
from layer_tying.policies.base import LARGEST_REWARD, Action, Policy
from layer_tying.policies.dqn import DQN


class Layers(Protocol):
    """The face of ``TiedLayers``, which its stand-ins in ablations have too."""

    tying: Tying
    rules: Rules
    stack: LayerStack

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are kept in step."""
        ...

    def parameters(self, layer: int) -> Parameters:
        """The parameters that a layer uses, by their names within the layer."""
        ...

    def apply(self, tying: Tying) -> None:
        """Change to another tying."""
        ...

    def verify(self) -> None:
        """Raise an AssertionError if the layers are not what their tying says."""
        ...


@dataclass(frozen=True)
class Decision:
    """One decision of a policy, as it is logged.

    Attributes:
        step: how many optimizer steps had been done.
        action: for each layer, the layer it was told to use.
        state: the tying's owners after the decision.
        reward: what followed, None where the policy does not learn or could not from this one
            (infinite, not a number, or so large that its square is not finite).
        event: what went wrong, if anything did.
        statistics: what the policy says of the decision (epsilon, Q-values).
    """

    step: int
    action: Action
    state: tuple[int, ...]
    reward: float | None
    event: str | None
    statistics: Mapping[str, Any]


class DynamicTying:
    """A policy that decides, while a model trains, which of its layers share weights.

    Args:
        model: any transformer whose layers are one list of equal blocks.
        optimizer: the model's optimizer (or several); it is kept in step with the tying.
        every: k, the number of optimizer steps from one decision to the next.
        policy: who decides; the paper's agent by default.
        initial: the tying to start from: ``"all"`` layers tied (the paper's start; the weights of
            all layers but the first are dropped), ``"none"`` for a pretrained model that shall be
            tied down, a ``Tying``, or ``"keep"`` for the tying the model comes with.
        max_independent: a hard limit on the number of independent layers.
        seed: of the default policy.
        layers: see ``TiedLayers``; or the layers themselves, prepared by one with this model and
            optimizer: the options that follow are then given to it.
        untied, gradient, moments, inherit, by_kind: see ``TiedLayers``.

    Raises:
        InputError: if the layers cannot be found, or an option does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None,
        *,
        every: int = 50,
        policy: Policy | None = None,
        initial: Literal["all", "none", "keep"] | Tying = "all",
        max_independent: int | None = None,
        seed: int = 0,
        layers: str | Sequence[str] | Layers | None = None,
        untied: Sequence[str] = (),
        gradient: Literal["sum", "owner"] = "sum",
        moments: Literal["copy", "fresh"] = "copy",
        inherit: Literal["first", "majority"] = "first",
        by_kind: bool = False,
    ) -> None:
        distributed.refuse_sharded(model.parameters())
        if every < 1:
            raise InputError(f"every is the number of steps between decisions, got {every}")
        options = {"untied": untied, "gradient": gradient, "moments": moments}
        options |= {"inherit": inherit, "by_kind": by_kind}
        if layers is None or isinstance(layers, (str, Sequence)):
            layers = TiedLayers(model, optimizer, layers=layers, **options)  # type: ignore[arg-type]
        else:
            _check_prepared(layers, model, optimizer, options)
        self.layers: Layers = layers
        kinds = self.layers.rules.kinds
        self.rules = Rules(kinds, len(kinds) if max_independent is None else max_independent)
        self.policy = DQN(len(kinds), seed=seed) if policy is None else policy
        if isinstance(policy, (DQN, Bandit)) and policy.num_layers != len(kinds):
            raise InputError(
                f"the agent was made for {policy.num_layers} layers, this model has "
                f"{len(kinds)}: make it with {type(policy).__name__}({len(kinds)}, ...)"
            )
        self.every = every
        self.num_steps = 0
        self._waiting: tuple[Tying, Action, Tying] | None = None  # a decision without its reward
        start = self._initial(initial)
        self.rules.check(start)
        if isinstance(self.policy, Bandit):
            self.policy.check_start(start, self.rules)
        self.layers.apply(start)

    def _initial(self, initial: str | Tying) -> Tying:
        if isinstance(initial, Tying):
            return initial
        if initial == "all":
            return self.rules.tightest
        if initial == "none":
            return Tying.independent(self.layers.tying.num_layers)
        if initial == "keep":
            return self.layers.tying
        raise InputError(f"initial is 'all', 'none', 'keep' or a Tying, got {initial!r}")

    @property
    def tying(self) -> Tying:
        """The tying in force."""
        return self.layers.tying

    @property
    def decision_is_due(self) -> bool:
        """Whether the next call of ``step`` decides."""
        return self.num_steps % self.every == 0

    def step(self, reward: Callable[[], float] | None) -> Decision | None:
        """Count an optimizer step; on the first and every k-th after it, decide.

        The layers are re-tied, the reward of the new tying is measured and the policy learns from
        it (Algorithm 1, lines 7-27). Call it after ``optimizer.step()``, gradients cleared.

        With several processes, rank 0's action is everyone's and the reward is their mean.

        Args:
            reward: measures how well the model does now, the higher the better. The paper's is
                minus the perplexity of one training batch, in eval mode and without gradients.
                None where it is known only later: then give it to ``learn``.

        Returns:
            The decision, or None at a step without one.

        Raises:
            InputError: if the weights of several processes have drifted apart: the gradients of a
                layer that became independent were not averaged.
        """
        step, self.num_steps = self.num_steps, self.num_steps + 1
        if step % self.every:
            return None
        distributed.check_in_sync(dict(self.layers.stack.model.named_parameters()))
        state = self.tying
        action = distributed.from_rank_0(self.policy.act(state, self.rules))
        next_state = Tying.from_action(action)
        self.rules.check(next_state)
        self.layers.apply(next_state)
        self.learn(None)  # where the last decision still waits for its reward, it never came
        self._waiting = state, action, next_state
        measured, event = None, None
        if not self.policy.learns:
            self.learn(None)
        elif reward is not None:
            measured, event = self.learn(reward())
        return Decision(
            self.num_steps, action, next_state.owners, measured, event, self.policy.statistics()
        )

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
        """The pattern, the step and the policy's state: tensors and JSON-able values."""
        return {
            "owners": list(self.tying.owners),
            "num_steps": self.num_steps,
            "waiting": self._waiting and [list(self._waiting[1]), list(self._waiting[0].owners)],
            "policy_class": type(self.policy).__name__,
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned; re-ties the layers.

        The weights and the optimizer's state are the caller's to load, after this: before it, the
        model and the optimizer may have fewer parameters than were saved.

        Raises:
            InputError: if it is the state of another policy, or of a model that differs.
        """
        policy_class = type(self.policy).__name__
        if state["policy_class"] != policy_class:
            raise InputError(
                f"the saved state is of another policy, {state['policy_class']}: "
                f"it cannot go on with {policy_class}"
            )
        self.layers.apply(Tying(tuple(state["owners"])))
        self.num_steps = state["num_steps"]
        self._waiting = None
        if state["waiting"]:
            action, before = state["waiting"]
            self._waiting = Tying(tuple(before)), tuple(action), Tying.from_action(action)
        self.policy.load_state_dict(state["policy"])


def _check_prepared(
    layers: Layers,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    options: Mapping[str, object],
) -> None:
    """Layers that come prepared are of this model and optimizer, and have their options already."""
    if layers.stack.model is not model:
        raise InputError("the layers are of another model: prepare them with this one")
    optimizers = listed(optimizer)
    if [id(each) for each in optimizers] != [id(each) for each in layers.optimizers]:
        raise InputError(
            f"the layers were prepared with {len(layers.optimizers)} optimizer(s), and they are "
            f"not the {len(optimizers)} given here: TiedLayers(model, optimizer) keeps its "
            f"parameters in step"
        )
    usual: dict[str, object] = {"untied": (), "gradient": "sum", "moments": "copy"}
    usual |= {"inherit": "first", "by_kind": False}
    for name, value in options.items():
        if value != usual[name]:
            raise InputError(f"{name}={value!r} comes too late: give it to TiedLayers")
