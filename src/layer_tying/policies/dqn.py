"""The paper's agent: a Q-network over tyings, epsilon-greedy, one temporal-difference update each.

The Q-network maps a state (who owns whose weights) to a lower-triangular matrix Q(s), whose entry
[i, j] is the value of layer i using layer j's weights: an action-branching Q-network (Tavakoli et
al. 2018) with branches of size 1, 2, ..., L. Matrices are [L, L] with -inf above the diagonal.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layer_tying.core.tying import Rules, Tying
from layer_tying.policies.base import LARGEST_REWARD, Action, Policy, within_budget


def action_value(q: Tensor, action: Tensor) -> Tensor:
    """Q(s, a), the mean over layers of the entries an action picks (our reading of Eq. 3).

    Args:
        q: [L, L] lower-triangular action values of a state.
        action: [L] the layer that each layer uses.

    Returns:
        A scalar.
    """
    return q.gather(1, action[:, None]).mean()


def max_action_value(q: Tensor) -> Tensor:
    """max_a Q(s, a): the mean over layers of each row's maximum. ``q`` is [L, L]; a scalar."""
    return q.max(dim=1).values.mean()


def td_target(r_t: float, discount: float, q_t: Tensor) -> Tensor:
    """r + gamma max_a Q(s', a), the target of Algorithm 1, line 23; carries no gradient.

    Args:
        r_t: the reward that followed the action.
        discount: gamma.
        q_t: [L, L] action values of the next state.
    """
    return r_t + discount * max_action_value(q_t.detach())


class QNetwork(nn.Module):
    """State -> 128 -> lower-triangular action values.

    Args:
        num_layers: L.
        hidden: width of the hidden layer.
    """

    def __init__(self, num_layers: int, hidden: int = 128) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.body = nn.Sequential(
            nn.Linear(num_layers, hidden, dtype=torch.float32),
            nn.ReLU(),
            nn.Linear(hidden, num_layers * (num_layers + 1) // 2, dtype=torch.float32),
        )

    def forward(self, state: Tying) -> Tensor:
        """Return [L, L] action values, -inf above the diagonal. Owners are scaled to [0, 1]."""
        scale = max(self.num_layers - 1, 1)
        with torch.autocast("cpu", enabled=False):
            flat = self.body(torch.tensor(state.owners, dtype=torch.float32) / scale)
        rows, columns = torch.tril_indices(self.num_layers, self.num_layers)
        matrix = torch.full((self.num_layers,) * 2, -torch.inf, dtype=torch.float32)
        return matrix.index_put((rows, columns), flat)


class DQN(Policy):
    """The agent of Algorithm 1. It has its own random numbers and stays on the CPU, in float32.

    Args:
        seed: of the network's weights and of exploration.
        discount: gamma.
        learning_rate: of AdamW on the Q-network.
        epsilon: the share of layers that explore at the first decision.
        epsilon_decay: its factor at each decision.
        epsilon_min: its floor.
    """

    reward = "evaluation"

    def __init__(
        self,
        *,
        seed: int = 0,
        discount: float = 0.99,
        learning_rate: float = 1e-3,
        epsilon: float = 1.0,
        epsilon_decay: float = 0.95,
        epsilon_min: float = 0.1,
    ) -> None:
        self.seed = seed
        self.discount = discount
        self.learning_rate = learning_rate
        self.first_epsilon = epsilon
        self.epsilon_decay = epsilon_decay
        self.epsilon_min = epsilon_min
        self._rng = np.random.default_rng(seed)
        self._statistics: dict[str, Any] = {}

    def reset(self, start: Tying, rules: Rules) -> None:
        """Begin a run with a new Q-network."""
        self.rules = rules
        self.epsilon = self.first_epsilon
        with torch.device("cpu"), torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)  # torch.manual_seed would seed GPUs too
            self.network = QNetwork(len(rules.kinds))
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate)

    def act(self, state: Tying) -> Action:
        """Epsilon-greedy for each layer: a random layer it may use, or the most valuable one."""
        with torch.device("cpu"), torch.no_grad():
            q = self.network(state).numpy()
        action = []
        for layer in range(state.num_layers):
            choices = self.rules.choices(layer)
            if self._rng.random() < self.epsilon:
                action.append(int(self._rng.choice(choices)))
            else:
                action.append(max(choices, key=lambda j: q[layer, j]))
        self._statistics = {
            "epsilon": self.epsilon,
            "q": [[round(float(q[i, j]), 6) for j in range(i + 1)] for i in range(len(q))],
        }
        return within_budget(action, q, self.rules)

    def observe(
        self, state: Tying, action: Action, reward: float | None, next_state: Tying
    ) -> None:
        """One temporal-difference update (lines 22-25), then epsilon decays (line 27).

        Without a reward that is finite, also when squared, nothing is learned, so that Q never
        becomes NaN.
        """
        if reward is not None and abs(reward) < LARGEST_REWARD:
            with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
                self._update(state, action, reward, next_state)
        self.epsilon = max(self.epsilon_decay * self.epsilon, self.epsilon_min)

    def _update(self, state: Tying, action: Action, reward: float, next_state: Tying) -> None:
        predicted = action_value(self.network(state), torch.tensor(action))
        with torch.no_grad():
            q_next = _allowed(self.network(next_state), self.rules.kinds)
        target = td_target(reward, self.discount, q_next)
        loss = nn.functional.mse_loss(predicted, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def statistics(self) -> dict[str, Any]:
        """The last decision's ``epsilon`` and ``q``, the rows of Q(s)."""
        return self._statistics

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, epsilon and random numbers, copied: going on does not change them."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epsilon": self.epsilon,
            "rng": self._rng.bit_generator.state,
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # torch would alias it
        self.epsilon = state["epsilon"]
        self._rng.bit_generator.state = state["rng"]


def _allowed(q: Tensor, kinds: Sequence[int]) -> Tensor:
    """Forbid ties between layers of different kinds: their values are never trained."""
    kind = torch.tensor(kinds)
    return torch.where(kind[:, None] == kind, q, -torch.inf)
