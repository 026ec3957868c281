"""The rows of the paper, each a ``TrainConfig``, at its scale or at one for a CPU.

Scales:
- ``paper``: GPT-2 of 48 layers x 1600, as published. Sequence length 256, batches of 16, learning
  rate 1e-4, weight decay 0.01 and dropout 0.2 are those of the published code. Heads are GPT-2
  XL's 25, steps, k and all of BERT, ViT and fine-tuning are our choice where a docstring does not
  say otherwise: the paper's sources that we have do not give them.
- ``small``: 12 layers x 64, trained so long that depth is worth something (GPT-2 on bytes: 28
  tokens a parameter) and that a row takes minutes on one CPU thread. Its figures compare with each
  other, not with the paper's.

A row that starts from another row's run expects it in the same folder, under that row's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layer_tying.data.glue import TASKS
from layer_tying.runs.config import SHAPE, TrainConfig
from layer_tying.runs.reading import has_ended

SCALES = ("small", "paper")
TYINGS = {"keep": "fixed", "dynamic": "dqn", "none": "none"}  # of fine-tuning -> policy
POLICY_OF = {"conventional": "none", "dynamic": "dqn"}
SHALLOW = (
    "shallow"  # a quarter of the layers, conventionally: what depth is worth is measured by it
)
QUARTERS: dict[str, dict[str, Any]] = {  # with the parameters of a quarter of the layers
    "cycle": {"policy": "cycle", "residual_scaling": 1.0},
    "mixture": {"policy": "mixture", "residual_scaling": 1.0},
}
GPT2_DATASETS = ("wiki2", "wiki103", "lambada", "1b")
SUBWORDS = "subwords"  # small GPT-2 on WikiText-2 in subwords, which GLUE starts from
EPOCHS = {"sst2": 2, "qnli": 1}  # of fine-tuning at small scale: their training parts are large
BASE: dict[str, dict[str, Any]] = {
    "small": {
        **{"nlayers": 12, "nhead": 2, "emsize": 64, "bptt": 64, "tokenizer": "bytes"},
        **{"batch_size": 8, "lr": 4e-3, "max_steps": 10_000, "every": 50, "precision": "fp32"},
        **{"eval_every": 1000, "eval_batches": 20, "save_every": 1000, "log_every": 100},
    },
    "paper": {
        **{"nlayers": 48, "nhead": 25, "emsize": 1600, "bptt": 256, "tokenizer": "gpt2"},
        **{"batch_size": 16, "lr": 1e-4, "weight_decay": 0.01, "dropout": 0.2},
        **{"max_steps": 50_000, "every": 50},
    },
}


def recipes(scale: str, output_dir: str | None = None, seed: int = 0) -> dict[str, TrainConfig]:
    """Every row by its name; a row that starts from another one's run comes after it.

    Args:
        scale: ``small`` or ``paper``.
        output_dir: where the runs lie; by default ``runs/SCALE``, or ``runs/SCALE-SEED``.
        seed: of all rows; that which is retrained has the next one.
    """
    folder = output_dir or (f"runs/{scale}-{seed}" if seed else f"runs/{scale}")
    triple = (*POLICY_OF, SHALLOW)
    rows = [
        *(gpt2(data, side, scale, folder) for data in GPT2_DATASETS for side in triple),
        *(subwords(side, folder) for side in triple if scale == "small"),
        gpt2("wiki2", "random", scale, folder),
        *(quarter(name, scale, folder) for name in QUARTERS),
        final_from_the_start(scale, folder),
        retrained(scale, folder),
        permuted(scale, folder),
        without_tying(scale, folder),
        *(bert(side, scale, folder) for side in (*triple, "mixture")),
        *(vit(side, scale, folder) for side in (*triple, "mixture")),
        *(glue(task, tying, scale, folder) for task in TASKS for tying in TYINGS),
    ]
    return {row.logging.exp: row.replace(seed=row.seed + seed) for row in rows}


def runs_first(config: TrainConfig) -> str | None:
    """The recipe whose run a row starts from, if that run has not ended yet."""
    source = config.tying.source
    if source is None or has_ended(Path(source)):
        return None
    return Path(source).name


def gpt2(dataset: str, side: str, scale: str, folder: str) -> TrainConfig:
    """A language model, of any side; ``random``: changes as frequent as the agent's decisions."""
    return _row(f"gpt2-{dataset}-{side}", scale, folder, dataset=dataset, **_side(side, scale))


def subwords(side: str, folder: str) -> TrainConfig:
    """GPT-2 on WikiText-2 in subwords, at small scale.

    A pair of sentences of GLUE fits into 128 subwords, and not into 64 bytes.
    """
    row = gpt2("wiki2", side, "small", folder)
    changes = {"tokenizer": "bpe:4096", "bptt": 128, "batch_size": 16, "max_steps": 4000}
    return row.replace(**changes, exp=f"gpt2-{SUBWORDS}-{side}")


def quarter(name: str, scale: str, folder: str) -> TrainConfig:
    """A rival of the agent's that has the parameters of a quarter of the layers."""
    groups = max(2, BASE[scale]["nlayers"] // 4)
    changes = QUARTERS[name] | {"dataset": "wiki2", "groups": groups}
    return _row(f"gpt2-wiki2-{name}", scale, folder, **changes)


def final_from_the_start(scale: str, folder: str) -> TrainConfig:
    """Ablation: the architecture that the dynamic run ended with, from the first step on."""
    return _row("gpt2-wiki2-final", scale, folder, **_after_dynamic(folder), policy="fixed")


def retrained(scale: str, folder: str) -> TrainConfig:
    """The pattern found, trained from scratch with another seed (the paper's reviewers asked)."""
    return _row(
        "gpt2-wiki2-retrained", scale, folder, **_after_dynamic(folder), policy="fixed", seed=1
    )


def permuted(scale: str, folder: str) -> TrainConfig:
    """Ablation: the dynamic run's decisions, applied to a permutation of the layers."""
    return _row(
        "gpt2-wiki2-permuted", scale, folder, **_after_dynamic(folder), policy="recorded", permute=0
    )


def without_tying(scale: str, folder: str) -> TrainConfig:
    """Ablation: the agent decides which layers are frozen, and nothing is copied."""
    return _row("gpt2-wiki2-frozen", scale, folder, dataset="wiki2", policy="dqn", sharing="frozen")


def bert(side: str, scale: str, folder: str) -> TrainConfig:
    """BERT on masked tokens of WikiText-2.

    At paper scale BERT-base, 12 layers x 768: what the published code builds (as a decoder).
    """
    changes: dict[str, Any] = {"family": "bert", "dataset": "wiki2"}
    if scale == "paper":
        changes |= {"nlayers": 12, "nhead": 12, "emsize": 768, "tokenizer": "bert-base-uncased"}
    else:
        changes |= {"batch_size": 64, "lr": 2e-3, "init_std": 0.04, "max_steps": 5000}
    changes |= _side(side, scale, changes.get("nlayers"))
    return _row(f"bert-wiki2-{side}", scale, folder, **changes)


def vit(side: str, scale: str, folder: str) -> TrainConfig:
    """ViT on CIFAR-10.

    At paper scale 32 layers x 1280 with 16 heads (ViT-Huge, whose feed-forward width of 5,120 is
    the published code's), on images of 32 x 32 in patches of 4 x 4, a decision every 10 steps.
    """
    changes: dict[str, Any] = {"family": "vit", "dataset": "cifar10"}
    if scale == "paper":
        changes |= {"nlayers": 32, "nhead": 16, "emsize": 1280, "batch_size": 20, "every": 10}
    else:
        changes |= {"dataset": "cifar10-jpeg", "batch_size": 32, "max_steps": 14_000}
        changes |= {"lr": 5e-4, "init_std": 0.06}
    changes |= _side(side, scale, changes.get("nlayers"))
    return _row(f"vit-cifar10-{side}", scale, folder, **changes)


def glue(task: str, tying: str, scale: str, folder: str) -> TrainConfig:
    """Fine-tuning of the WikiText-2 models (at small scale, of subwords) for a task of GLUE.

    ``keep`` and ``dynamic`` start from the dynamic run; ``none`` is the conventional run,
    fine-tuned with all layers independent, against which the paper compares.
    """
    side = "conventional" if tying == "none" else "dynamic"
    small = scale == "small"
    pretrained = subwords(side, folder) if small else gpt2("wiki2", side, scale, folder)
    shape = pretrained.flat()
    changes = {name: shape[name] for name in SHAPE}
    changes |= {"max_steps": None, "epochs": 3}
    if small:
        changes |= {"batch_size": 32, "lr": 1e-3, "every": 10, "eval_every": 100}
        changes |= {"epochs": EPOCHS.get(task, 3)}
    else:
        changes |= {"lr": 2e-5, "dropout": 0.1}
    return _row(
        f"glue-{task}-{tying}",
        scale,
        folder,
        **changes,
        task=task,
        policy=TYINGS[tying],
        source=str(pretrained.folder),
    )


def _side(side: str, scale: str, depth: int | None = None) -> dict[str, Any]:
    """What a side differs in: the policy, or a quarter of the layers (of ``depth``, if given)."""
    if side == SHALLOW:
        return {"policy": "none", "nlayers": max(2, (depth or BASE[scale]["nlayers"]) // 4)}
    return {"policy": POLICY_OF.get(side, side)}


def _after_dynamic(folder: str) -> dict[str, Any]:
    return {"dataset": "wiki2", "source": str(Path(folder) / "gpt2-wiki2-dynamic")}


def _row(name: str, scale: str, folder: str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {**BASE[scale], **changes, "exp": name, "output_dir": folder}
    return TrainConfig.from_flat(**settings)
