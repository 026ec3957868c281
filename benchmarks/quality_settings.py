"""The settings and the methods of the benchmark of sharing, as records.

To add a setting, add its record to `SETTINGS`; to add a method, a line to `methods_of`.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layer_tying.data.pydocs import SKIPPED, split_documents
from layer_tying.data.texts import load_texts
from layer_tying.paper.rows import recipes
from layer_tying.runs.processes import COMMAND

Flags = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """Data, a shape and a number of steps, the same for all methods.

    Attributes:
        about: what is trained, in one line of the page.
        flags: of `layer-tying train`; `nlayers` is L, and `emsize` the width of every method but
            the narrow one.
        sets: k, how many layers' parameters the shared methods and their rival have.
        rates: learning rates to choose from; the middle one is tried first.
        accuracy: whether the figure is an accuracy, to be maximised, and not a perplexity.
        cut: writes the data into a folder, where they are a part of a text.
        all_methods: whether also those are trained, by default, that no sentence is about.
    """

    about: str
    flags: Flags
    sets: tuple[int, ...] = (3,)
    rates: tuple[float, float, float] = (1e-3, 2e-3, 4e-3)
    accuracy: bool = False
    cut: Callable[[Path], None] | None = None
    all_methods: bool = False

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return self.flags["nlayers"]

    @property
    def deep(self) -> str:
        """The method that all are measured against: L independent layers."""
        return f"plain-{self.depth}"

    @property
    def rival(self) -> str:
        """The method of equal parameters without sharing: k layers."""
        return f"plain-{self.sets[0]}"


def methods_of(setting: Setting) -> dict[str, Flags]:
    """What is trained in a setting, by name: the flags in which a method differs."""
    methods: dict[str, Flags] = {setting.deep: {"policy": "none"}}
    for k in setting.sets:
        methods[f"plain-{k}"] = {"policy": "none", "nlayers": k}
        methods[f"mixture-{k}"] = {"policy": "mixture", "groups": k, "residual_scaling": 1.0}
        methods[f"cycle-{k}, 1/n"] = {"policy": "cycle", "groups": k, "residual_scaling": 1.0}
    k = setting.sets[0]
    half = setting.flags["max_steps"] // 2
    methods[f"mixture-{k}, half the steps"] = {**methods[f"mixture-{k}"], "max_steps": half}
    fewer = {"nlayers": setting.depth // 2}
    methods[half_as_deep(setting)] = {**methods[f"mixture-{k}"], **fewer}
    for name in ("cycle", "sequence", "sandwich", "cycle-reverse"):
        flags = {"policy": name, "groups": k}
        methods[f"{name}-{k}"] = flags
        methods[f"{name}-{k}, 1/n"] = flags | {"residual_scaling": 1.0}
    methods[f"mixture-{k}, unscaled"] = {"policy": "mixture", "groups": k, "residual_scaling": 0.0}
    methods[f"low-rank-{k}"] = {"policy": "none"}
    methods["narrow"] = {"policy": "none", "emsize": setting.flags["emsize"] // 2}
    methods["random"] = {"policy": "random", "settle": 0.5}
    methods["dqn"] = {"policy": "dqn"}
    return methods


def command_of(setting: Setting, method: str) -> tuple[str, ...]:
    """The command that trains a method."""
    if not method.startswith("low-rank"):
        return COMMAND
    share = setting.sets[0] / setting.depth
    return sys.executable, str(Path(__file__).with_name("low_rank.py")), str(share)


def half_as_deep(setting: Setting) -> str:
    """A mixture that takes half the time: with half as many layers."""
    return f"mixture-{setting.sets[0]}, half the layers"


def timed(setting: Setting) -> list[str]:
    """The methods that are compared against time."""
    k = setting.sets[0]
    fixed, mixed = f"cycle-{k}, 1/n", f"mixture-{k}"
    return [setting.deep, setting.rival, fixed, mixed, half_as_deep(setting)]


def claimed(setting: Setting) -> list[str]:
    """The methods that the page's sentences are about: three seeds each."""
    k = setting.sets[0]
    fast = [] if setting.accuracy else [half_as_deep(setting)]
    return [setting.rival, setting.deep, f"mixture-{k}", f"cycle-{k}, 1/n", *fast]


def by_default(setting: Setting) -> list[str]:
    """The methods that are trained where none is named."""
    return list(methods_of(setting)) if setting.all_methods else claimed(setting)


def tuned(setting: Setting) -> list[str]:
    """The methods that have three learning rates to choose from; others have the mixture's."""
    return claimed(setting)[:3]


def _part_of(text: str, train: int, held_out: int) -> Callable[[Path], None]:
    """Writes the first characters of a text's splits into a folder."""

    def cut(folder: Path) -> None:
        texts = load_texts(text)
        folder.mkdir(parents=True, exist_ok=True)
        parts = {
            "train": texts.train[:train],
            "valid": texts.validation[:held_out],
            "test": texts.test[:held_out],
        }
        for split, part in parts.items():
            (folder / f"{split}.txt").write_text(part, encoding="utf-8")

    return cut


def _library(folder: Path) -> None:
    """Writes the sources of Python's standard library into a folder, each file in one split."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {file.relative_to(library): file for file in library.rglob("*.py")}
    documents = {
        f"module {name.as_posix()}": file.read_text("utf-8", "ignore")
        for name, file in files.items()
        if not SKIPPED & {*name.parts}
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in zip(("train", "valid", "test"), split_documents(documents), strict=True):
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")


def of_the_paper(name: str) -> Flags:
    """The flags of a row of the paper at its small scale, but what says where the run lies."""
    flags = recipes("small")[name].flat()
    return {name: value for name, value in flags.items() if name not in ("exp", "output_dir")}


USUAL: Flags = {
    **{"epochs": 1000, "precision": "fp32", "eval_every": 1000, "eval_batches": 20},
    **{"save_every": 1000, "log_every": 100, "every": 50},
}
LLAMA: Flags = {**USUAL, "family": "llama", "nlayers": 12, "nhead": 2, "emsize": 64}
SETTINGS: dict[str, Setting] = {
    "wiki2-bytes": Setting(
        "WikiText-2 as bytes: 12 layers x 64, rotary positions, 10,000 steps of 8 x 64 tokens",
        {**LLAMA, "tokenizer": "bytes", "bptt": 64, "batch_size": 8, "max_steps": 10_000},
        sets=(3, 2, 4),
        cut=_part_of("wiki2", 5_500_000, 200_000),
        all_methods=True,
    ),
    "khop": Setting(
        "k-hop induction, up to six hops: 6 layers x 64, 8,000 steps of 32 x 49 fresh tokens",
        {**LLAMA, "nlayers": 6, "nhead": 4, "init_std": 0.1, "dataset": "khop:6", "bptt": 49}
        | {"batch_size": 32, "max_steps": 8000, "final_lr": 0.0, "weight_decay": 0.0},
        sets=(2,),
        rates=(5e-4, 1e-3, 2e-3),
        accuracy=True,
    ),
    "library-subwords": Setting(
        "sources of Python's standard library in 1,024 subwords: GPT-2 of 12 layers x 64, 10,000 "
        "steps of 8 x 64 tokens",
        {**LLAMA, "family": "gpt2", "tokenizer": "bpe:1024", "bptt": 64, "batch_size": 8}
        | {"max_steps": 10_000},
        rates=(2e-3, 4e-3, 8e-3),
        cut=_library,
    ),
    "vit": Setting(
        "all CIFAR-10 images, as JPEG: ViT of 12 layers x 64, 14,000 steps of 32 images",
        of_the_paper("vit-cifar10-conventional"),
        rates=(2.5e-4, 5e-4, 1e-3),
        accuracy=True,
    ),
    "wiki2-passes": Setting(
        "300 KB of WikiText-2 as bytes, ten passes: GPT-2 of 12 layers x 96, 6,000 steps of 8 x "
        "64 tokens",
        {**LLAMA, "family": "gpt2", "nhead": 4, "emsize": 96, "tokenizer": "bytes", "bptt": 64}
        | {"batch_size": 8, "max_steps": 6000, "eval_every": 500, "save_every": 3000},
        rates=(2e-3, 4e-3, 8e-3),
        cut=_part_of("wiki2", 300_000, 100_000),
    ),
}
