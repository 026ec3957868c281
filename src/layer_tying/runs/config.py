"""What a run is: one frozen, validated dataclass that makes a round trip through JSON.

Every field of ``TrainConfig`` is a flag of ``layer-tying train`` (``max_steps`` is
``--max-steps``), with its help text and its default from here.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from layer_tying.core.patterns import PATTERNS
from layer_tying.data.glue import TASKS
from layer_tying.errors import InputError

DECIDING = ("dqn", "bandit", "random")  # the policies that change the tying while a model trains
POLICIES = (*DECIDING, "recorded", "fixed", *PATTERNS)
FAMILIES = ("gpt2", "llama", "bert", "vit")
EXPORT_DTYPES = ("fp32", "bf16", "fp16")
# What a fine-tuned model has from the run it starts from.
SHAPE = ("family", "tokenizer", "objective", "nlayers", "nhead", "emsize", "bptt")


def _flag(
    default: Any, help: str, choices: tuple[str, ...] | None = None, name: str | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "name": name})


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Raises:
        InputError: if a value is out of its range, or two values contradict each other.
    """

    policy: str = _flag(
        "bandit", "who decides which layers are tied; dqn is the paper's agent", POLICIES
    )
    groups: int | None = _flag(None, "number of groups of a static pattern that needs one")
    owners: str | None = _flag(None, "the pattern of --policy fixed, such as 0,0,2,2")
    source: str | None = _flag(
        None, "the run whose last pattern is fixed, or whose decisions are recorded", name="from"
    )
    permute: int | None = _flag(
        None, "seed of a permutation of the layers, to which what was recorded is applied"
    )
    activate_at: float | None = _flag(
        None, "share of the run that a static pattern waits, all layers being independent"
    )
    sharing: str = _flag(
        "tied",
        "what becomes of a layer that is not independent; frozen: it keeps its own weights",
        ("tied", "frozen"),
    )
    task: str | None = _flag(None, "the GLUE task to fine-tune for", TASKS)
    family: str = _flag("gpt2", "the kind of transformer", FAMILIES)
    dataset: str = _flag(
        "", "a data set's name, or the path of a text file or folder (default: pydocs; vit: digits)"
    )
    data_dir: str | None = _flag(None, "where local data sets lie (else $LAYER_TYING_DATA)")
    tokenizer: str = _flag("bytes", "bytes, bpe:N (learned), gpt2, bert-base-uncased, or a path")
    objective: str = _flag("masked", "what BERT learns to predict", ("masked", "causal"))
    nlayers: int = _flag(8, "L, the number of layers")
    nhead: int = _flag(4, "attention heads")
    emsize: int = _flag(128, "width of the model")
    bptt: int = _flag(128, "sequence length in tokens")
    dropout: float = _flag(0.0, "dropout probability")
    batch_size: int = _flag(8, "sequences in a batch, over all processes")
    eval_batch_size: int = _flag(32, "sequences in an evaluation batch")
    accumulate: int = _flag(1, "batches whose gradients make one optimizer step")
    optimizer: str = _flag(
        "adamw",
        "adamw, or adamw8bit: its moments in 8 bits, by bitsandbytes",
        ("adamw", "adamw8bit"),
    )
    lr: float = _flag(3e-3, "peak learning rate of AdamW")
    warmup: float = _flag(0.05, "share of the steps over which the learning rate rises")
    final_lr: float = _flag(0.1, "where the cosine ends, as a share of the peak learning rate")
    weight_decay: float = _flag(0.1, "weight decay of matrices (vectors are not decayed)")
    clip: float = _flag(1.0, "largest norm of the gradient")
    epochs: int = _flag(1, "passes over the training split")
    max_steps: int | None = _flag(None, "optimizer steps; overrides --epochs")
    every: int = _flag(50, "k, the optimizer steps between decisions")
    gradient: str = _flag("sum", "whose gradient a shared weight gets", ("sum", "owner"))
    moments: str = _flag("copy", "optimizer state of a newly independent layer", ("copy", "fresh"))
    initial: str = _flag(
        "",
        "what a deciding policy starts from: a pattern (with --groups, if it needs a number); "
        "frozen: all tied in name, but not yet in memory (default: all; bandit: sandwich)",
        ("", *PATTERNS, "frozen"),
    )
    shared_init: str = _flag(
        "",
        "initial weights of shared layers; damped: what a layer adds to the residual stream is "
        "divided by the number of its uses (default: plain; bandit: damped; --from: as there)",
        ("", "plain", "damped"),
    )
    settle: float | None = _flag(
        None, "share of the run, at its end, without decisions (default: 0; bandit: 0.5)"
    )
    layer_price: float | None = _flag(
        None,
        "what an independent layer has to be worth to the bandit, in nats "
        "(default: their number stays what it is at the start)",
    )
    budget_layers: int | None = _flag(None, "the most layers that may ever be independent")
    budget_parameters: int | None = _flag(None, "the most parameters the model may ever have")
    budget_bytes: int | None = _flag(
        None, "the largest size of the model's compact export, in bytes and in --export-dtype"
    )
    export_dtype: str | None = _flag(
        None, "type of the weights in an export (default: as trained)", EXPORT_DTYPES
    )
    reward: str = _flag(
        "",
        "what the agent maximises: minus the (log-)perplexity of a training batch, or accuracy; "
        "training-loss: minus the mean loss of the steps since the last decision "
        "(default: log-perplexity; family vit: perplexity; bandit: training-loss)",
        ("", "log-perplexity", "perplexity", "accuracy", "training-loss"),
    )
    precision: str = _flag(
        "auto", "auto takes bf16 where it is measured to be faster", ("auto", "fp32", "bf16")
    )
    checkpointing: bool = _flag(False, "recompute activations in the backward pass")
    compile: bool = _flag(False, "compile the layers with torch.compile")
    seed: int = _flag(0, "of weights, data order and agent")
    exp: str = _flag("run", "name of the run, its folder in --output-dir")
    output_dir: str = _flag("runs", "where run folders are made")
    log_every: int = _flag(10, "optimizer steps between logged lines")
    eval_every: int | None = _flag(None, "steps between validations (default: a tenth of the run)")
    eval_batches: int | None = _flag(50, "most batches of a validation during training")
    save_every: int | None = _flag(None, "steps between checkpoints (default: as validations)")
    log_with: str | None = _flag(None, "also log to a tracker", ("tensorboard", "wandb", "mlflow"))

    def __post_init__(self) -> None:
        self._fill_in()
        for each in fields(self):
            choices = each.metadata["choices"]
            value = getattr(self, each.name)
            if choices and value is not None and value not in choices:
                raise InputError(f"{each.name} is one of {', '.join(choices)}; got {value!r}")
        self._check_ranges()
        if self.emsize % self.nhead:
            raise InputError(f"emsize {self.emsize} is not divisible by nhead {self.nhead}")
        if self.family == "llama" and self.emsize // self.nhead % 2:
            raise InputError(
                f"emsize {self.emsize} over nhead {self.nhead} is odd: "
                f"the heads of family llama have an even width, for rotary positions"
            )
        if self.max_steps is not None:
            self.check_every(self.max_steps)
        self._check_source()
        if self.has_budget and self.freezes:
            raise InputError(
                "a budget does not go with sharing or initial frozen: all layers are in memory"
            )
        if self.shared_init == "damped" and (self.freezes or self.task):
            raise InputError(
                "shared_init damped is for weights that are drawn at the start and shared: "
                "it does not go with frozen layers, nor with a task to fine-tune on"
            )
        parts = Path(self.exp).parts  # none of "" and "."
        if not parts or Path(self.exp).is_absolute() or ".." in parts:
            raise InputError(f"exp {self.exp!r} is not the name of a folder inside output-dir")

    def _fill_in(self) -> None:
        """Give the settings that were left open what is usual for the policy and the family."""
        is_bandit, is_vit = self.policy == "bandit", self.family == "vit"
        usual = {
            "dataset": self.task or ("digits" if is_vit else "pydocs"),
            "initial": "sandwich" if is_bandit else "all",
            "reward": "training-loss"
            if is_bandit
            else "perplexity"
            if is_vit
            else "log-perplexity",
            "settle": 0.5 if is_bandit else 0.0,
            "shared_init": self._usual_shared_init(),
        }
        for name, value in usual.items():
            if getattr(self, name) in ("", None):
                object.__setattr__(self, name, value)

    def _usual_shared_init(self) -> str:
        if self.policy in ("fixed", "recorded") and self.source and not self.task:
            return ""  # as the run has it whose tyings are used
        draws_shared = not (self.freezes or self.task)
        return "damped" if self.policy == "bandit" and draws_shared else "plain"

    def _check_ranges(self) -> None:
        at_least = {
            **dict.fromkeys(("nhead", "emsize", "bptt", "batch_size", "eval_batch_size"), 1),
            **dict.fromkeys(("accumulate", "epochs", "max_steps", "every", "log_every"), 1),
            **dict.fromkeys(("eval_every", "eval_batches", "save_every", "groups"), 1),
            **dict.fromkeys(("budget_layers", "budget_parameters", "budget_bytes"), 1),
            **dict.fromkeys(("seed", "weight_decay", "permute"), 0),
            "nlayers": 2,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is at least {least}, got {value}")
        for name in ("lr", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is more than 0, got {getattr(self, name)}")
        for name in ("lr", "weight_decay"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} is a finite number, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise InputError(f"seed is less than 2**32, got {self.seed}")
        if self.layer_price is not None and not math.isfinite(self.layer_price):
            raise InputError(f"layer_price is a finite number, got {self.layer_price}")
        for name in ("dropout", "warmup", "final_lr", "settle"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is between 0 and 1, got {getattr(self, name)}")
        if self.activate_at is not None and not 0 <= self.activate_at < 1:
            raise InputError(f"activate_at is at least 0 and below 1, got {self.activate_at}")

    def _check_source(self) -> None:
        """What says whose tying is used, and when, has to fit the policy."""
        if self.task:
            if self.family == "vit":
                raise InputError(f"task {self.task} is one of text, and family vit reads images")
            if not self.source:
                raise InputError(f"task {self.task} needs --from RUN, the run to fine-tune")
        elif self.policy == "recorded" and not self.source:
            raise InputError("policy recorded needs --from RUN, the run to replay")
        elif self.source and self.policy not in ("recorded", "fixed"):
            raise InputError(f"source: --from does not go with policy {self.policy}")
        if self.owners is not None and self.policy != "fixed":
            raise InputError(f"owners: --owners goes with policy fixed, not with {self.policy}")
        if self.policy == "fixed" and (self.owners is None) == (self.source is None):
            raise InputError("policy fixed needs one of --owners, such as 0,0,2,2, and --from RUN")
        if self.permute is not None and self.policy != "recorded":
            raise InputError(f"permute goes with policy recorded, not with {self.policy}")
        is_static = self.policy in ("fixed", *PATTERNS) and self.policy != "none"
        if self.layer_price is not None and self.policy != "bandit":
            raise InputError(f"layer_price goes with policy bandit, not with {self.policy}")
        if self.activate_at is not None and not is_static:
            raise InputError(
                f"activate_at goes with a static pattern that ties, not with policy {self.policy}"
            )

    @property
    def decides(self) -> bool:
        """Whether the tying may change while the model trains."""
        return self.policy in (*DECIDING, "recorded") or self.activate_at is not None

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

    def check_every(self, num_steps: int) -> None:
        """Raise an InputError if a policy would decide once only in a run of so many steps."""
        if self.decides and self.every > num_steps:
            raise InputError(
                f"every {self.every} is more than the {num_steps} steps of the run: "
                f"the policy would decide only once; take a smaller --every or more steps"
            )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.exp

    @property
    def digest(self) -> str:
        """SHA-256 of all that makes a run the experiment it is, in hexadecimal."""
        values = {key: value for key, value in asdict(self).items() if key not in _FREE}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The configuration as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """The configuration that ``to_json`` wrote.

        Raises:
            InputError: if it is not one.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise InputError(f"not a run's configuration: {error}") from None


# What may differ between a run and its resumption: where things lie and what is reported.
_FREE = {"data_dir", "output_dir", "exp", "log_every", "log_with", "save_every"}


def first_difference(one: TrainConfig, other: TrainConfig) -> str | None:
    """The first setting that makes two runs different experiments, or None."""
    for each in fields(TrainConfig):
        ours, theirs = getattr(one, each.name), getattr(other, each.name)
        if each.name not in _FREE and ours != theirs:
            return f"{each.name} is {ours!r} in one and {theirs!r} in the other"
    return None
