"""Which layers share weights, who decides it and within which limits, as settings. No torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from layer_tying.core.patterns import PATTERNS
from layer_tying.errors import InputError
from layer_tying.policies import POLICIES as DECIDING_RECORDS
from layer_tying.settings import check_at_least, check_finite, check_shares, check_types, hidden

DECIDING = tuple(DECIDING_RECORDS)  # the policies that run while a model trains
SETTLING = tuple(name for name, record in DECIDING_RECORDS.items() if record.decides)
LEARNING = tuple(name for name, record in DECIDING_RECORDS.items() if record.learns)
POLICIES = (*DECIDING, "recorded", "fixed", *PATTERNS)
EXPORT_DTYPES = ("fp32", "bf16", "fp16", "int8")

if TYPE_CHECKING:
    PolicyName = StartName = str
else:  # so that the command lists the names
    PolicyName = Literal[POLICIES]
    StartName = Literal[("", *PATTERNS, "frozen")]


@dataclass(frozen=True)
class TyingConfig:
    """Which layers share weights, and who decides it.

    Attributes:
        tyings: as owners separated by commas: what a deciding policy chose to start from; or, from
            the run that ``source`` names, the tying to begin with and, of policy recorded, one for
            each decision.

    Raises:
        InputError: if a value is out of its range, or two values contradict each other.
    """

    policy: PolicyName = "mixture"
    """who decides which layers are tied; mixture learns combinations of a few shared sets of
    weights, dqn is the paper's agent"""
    every: int = 50
    """k, the optimizer steps between decisions"""
    groups: int | None = None
    """number of groups of a pattern that needs one, be it static or what a policy starts from, or
    of shared sets of policy mixture"""
    owners: str | None = None
    """the pattern of --policy fixed, such as 0,0,2,2"""
    source: str | None = None
    """the run whose last pattern is fixed, or whose decisions are recorded"""
    permute: int | None = None
    """seed of a permutation of the layers; the recorded tyings are applied to the permuted ones"""
    activate_at: float | None = None
    """share of the run that a static pattern waits, all layers being independent"""
    sharing: Literal["tied", "frozen"] = "tied"
    """what becomes of a layer that is not independent; frozen: it keeps its own weights"""
    untied: str | None = None
    """what each layer keeps for itself: patterns of names of parameters within a layer, separated
    by commas, such as *ln_* (the norms of GPT-2)"""
    gradient: Literal["sum", "owner"] = "sum"
    """whose gradient a shared weight gets"""
    optimizer_state: Literal["copy", "fresh"] = "copy"
    """optimizer state of a newly independent layer"""
    residual_scaling: float | None = None
    """p of 1/n residual scaling: what a layer adds to the residual stream is multiplied by 1/n^p,
    where n layers use its weights (default: mixture: 1; others: 0)"""
    initial: StartName = ""
    """what a deciding policy starts from: a pattern (with --groups, if it needs a number); frozen:
    all tied in name, but not yet in memory (default: mixture: cycle; others: all)"""
    settle: float | None = None
    """share of the run, at its end, without decisions (default: 0)"""
    budget_layers: int | None = None
    """the most layers that may ever be independent"""
    budget_parameters: int | None = None
    """the most parameters the model may ever have"""
    budget_bytes: int | None = None
    """the largest size of the model's compact export, in bytes and in --export-dtype"""
    export_dtype: Literal["fp32", "bf16", "fp16", "int8"] | None = None
    """type of the weights in an export (default: as trained)"""
    reward: Literal["", "log-perplexity", "perplexity", "accuracy", "training-loss"] = ""
    """what the agent maximises: minus the (log-)perplexity of a training batch, or accuracy;
    training-loss: minus the mean loss of the steps since the last decision (default:
    log-perplexity; family vit: perplexity)"""
    tyings: tuple[str, ...] = hidden(())

    def __post_init__(self) -> None:
        check_types(self)
        budget = ("budget_layers", "budget_parameters", "budget_bytes")
        check_at_least(self, 1, ("every", "groups", *budget))
        check_at_least(self, 0, ("permute",))
        check_finite(self, ("residual_scaling",))
        check_shares(self, ("settle",))
        if self.activate_at is not None and not 0 <= self.activate_at < 1:
            raise InputError(f"activate_at is at least 0 and below 1, got {self.activate_at}")
        self._check_what_goes_with_the_policy()
        if self.has_budget and self.freezes:
            raise InputError(
                "a budget does not go with sharing or initial frozen: all layers are in memory"
            )
        if self.freezes and (self.residual_scaling or self.policy == "mixture"):
            raise InputError(
                "residual scaling and mixtures are of shared weights: they do not go with frozen "
                "layers; choose another policy, such as dqn"
            )

    @property
    def untied_names(self) -> tuple[str, ...]:
        """The patterns of ``untied``."""
        return tuple(self.untied.split(",")) if self.untied else ()

    def _check_what_goes_with_the_policy(self) -> None:
        ties_statically = self.policy in ("fixed", *PATTERNS) and self.policy != "none"
        if self.owners is not None and self.policy != "fixed":
            raise InputError(f"owners: --owners goes with policy fixed, not with {self.policy}")
        if self.groups is not None and not takes_groups(self.policy, self.initial):
            start = f" from {self.initial}" if self.initial else ""
            raise InputError(
                f"groups: --groups goes with a pattern that needs a number, such as cycle, "
                f"not with policy {self.policy}{start}"
            )
        if self.initial and self.policy not in DECIDING:
            raise InputError(
                f"initial: --initial goes with {', '.join(DECIDING)}, not with policy {self.policy}"
            )
        if self.permute is not None and self.policy != "recorded":
            raise InputError(f"permute goes with policy recorded, not with {self.policy}")
        if self.activate_at is not None and not ties_statically:
            raise InputError(
                f"activate_at goes with a static pattern that ties, not with policy {self.policy}"
            )
        if self.policy == "fixed" and (self.owners is None) == (self.source is None):
            raise InputError("policy fixed needs one of --owners, such as 0,0,2,2, and --from RUN")

    def check_source(self, for_task: bool) -> None:
        """Raise an InputError if the policy does not go with what ``--from`` names.

        Args:
            for_task: whether that run is fine-tuned, which any policy may do.
        """
        if for_task:
            return
        if self.policy == "recorded" and not self.source:
            raise InputError("policy recorded needs --from RUN, the run to replay")
        if self.source and self.policy not in ("recorded", "fixed"):
            raise InputError(f"source: --from does not go with policy {self.policy}")

    def check_asked(self, settled: Collection[str]) -> None:
        """Raise an InputError if something was asked for that the policy takes no note of.

        Args:
            settled: names of the settings that nobody asked for.
        """
        for name, policies in (("settle", SETTLING), ("reward", LEARNING)):
            is_asked = name not in settled and getattr(self, name) not in (None, "")
            if is_asked and self.policy not in policies:
                raise InputError(
                    f"{name}: --{name} goes with {', '.join(policies)}, not with policy "
                    f"{self.policy}"
                )

    def check_every(self, num_steps: int) -> None:
        """Raise an InputError if a policy would decide once only in a run of so many steps."""
        if self.decides and self.every > num_steps:
            raise InputError(
                f"every {self.every} is more than the {num_steps} steps of the run: "
                f"the policy would decide only once; take a smaller --every or more steps"
            )

    @property
    def decides(self) -> bool:
        """Whether the tying may change while the model trains."""
        decides = self.policy in DECIDING and DECIDING_RECORDS[self.policy].decides
        return decides or self.policy == "recorded" or self.activate_at is not None

    @property
    def has_budget(self) -> bool:
        """Whether the size of the model is limited."""
        limits = (self.budget_layers, self.budget_parameters, self.budget_bytes)
        return any(limit is not None for limit in limits)

    @property
    def freezes(self) -> bool:
        """Whether a layer that is not independent may be frozen instead of tied."""
        starts_frozen = self.policy in DECIDING and self.initial == "frozen"
        return self.sharing == "frozen" or starts_frozen


def takes_groups(policy: str, initial: str) -> bool:
    """Whether a run starts from a pattern whose number of groups can be chosen."""
    start = (initial or DECIDING_RECORDS[policy].start) if policy in DECIDING else policy
    return start in PATTERNS and PATTERNS[start].takes_groups
