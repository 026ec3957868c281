"""Whether a row means anything: it does if the conventional side of its comparison has learned.

A difference between models that have learned nothing says nothing, so the page of results shows the
rows of a comparison only if their gate is passed, and else says what was reached.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layer_tying.paper.rows import SHALLOW, SUBWORDS
from layer_tying.paper.seeds import Summary, share

Rows = Mapping[str, Summary]  # those of ``over_seeds``


@dataclass(frozen=True)
class Gate:
    """What the conventional side has to reach.

    Attributes:
        about: what is compared, in prose.
        least: the least figure.
        figure: the entry of the conventional row's summary; None for what depth is worth.
    """

    about: str
    least: float
    figure: str | None = None


DEPTH = 0.05  # by how much all layers have to be better than a quarter of them
GATES = {
    "gpt2-wiki2": Gate("GPT-2 on WikiText-2", DEPTH),
    "gpt2-wiki103": Gate("GPT-2 on WikiText-103", DEPTH),
    "gpt2-lambada": Gate("GPT-2 on LAMBADA", DEPTH),
    "gpt2-1b": Gate("GPT-2 on One Billion Words", DEPTH),
    f"gpt2-{SUBWORDS}": Gate("GPT-2 on WikiText-2 in subwords", DEPTH),
    "bert-wiki2": Gate("BERT on masked tokens of WikiText-2", 0.25, "masked_accuracy"),
    "vit-cifar10": Gate("ViT on CIFAR-10", 0.62, "accuracy"),
    "glue-sst2": Gate("SST-2", 0.78, "accuracy"),
}
CONVENTIONAL = {"glue-sst2": "none"}  # how the conventional row's name ends, where it is not so


def problem(comparison: str, rows: Rows) -> str | None:
    """Why the rows of a comparison are not shown, in a sentence's end; None if they are."""
    gate = GATES[comparison]
    name = f"{comparison}-{CONVENTIONAL.get(comparison, 'conventional')}"
    if name not in rows:
        return "the conventional row was not run"
    if gate.figure is None:
        return _problem_of_depth(comparison, rows)
    reached = rows[name].get(gate.figure)
    if reached is None:
        return f"the conventional row has no {gate.figure}"
    if reached < gate.least:
        what = gate.figure.replace("_", " ")
        return f"conventional training reached {what} {reached:.3f}, and the gate is {gate.least}"
    return None


def passed(comparison: str, rows: Rows) -> str:
    """What the conventional side of a comparison that is shown has reached, in a sentence's end."""
    gate, worth = GATES[comparison], worth_of_depth(comparison, rows)
    depth = "" if worth is None else _depth(worth)
    if gate.figure is None:
        return f"{depth} (gate: {DEPTH:.0%})"
    side = CONVENTIONAL.get(comparison, "conventional")
    what, reached = gate.figure.replace("_", " "), rows[f"{comparison}-{side}"][gate.figure]
    says = f"conventional training reached {what} {reached:.3f} (gate: {gate.least})"
    if worth is None:
        return says
    if worth < DEPTH:
        return f"{says}, but {depth}, so that sharing cannot be judged by it"
    return f"{says}, and {depth}"


def _problem_of_depth(comparison: str, rows: Rows) -> str | None:
    if f"{comparison}-{SHALLOW}" not in rows:
        return "no conventional model of a quarter of the layers was run"
    worth = worth_of_depth(comparison, rows)
    if worth is None:
        return "the models of all layers and of a quarter of them share no seed, or one diverged"
    if worth < DEPTH:
        return f"{_depth(worth)}, and the gate is {DEPTH:.0%}"
    return None


def worth_of_depth(comparison: str, rows: Rows) -> float | None:
    """By what share the perplexity of all layers is lower than that of a quarter of them."""
    shallow, deep = (rows.get(f"{comparison}-{side}", {}) for side in (SHALLOW, "conventional"))
    ratio = share(deep, shallow, "test_perplexity")
    return None if ratio is None else 1 - ratio


def _depth(worth: float) -> str:
    return f"the full model has {worth:.1%} lower perplexity than one with a quarter of its layers"
