"""The page of results, generated from the results file of the paper's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from layer_tying.data.glue import FORMATS
from layer_tying.paper.rows import TYINGS
from layer_tying.report.markdown import markdown_table
from layer_tying.tasks.metrics import METRICS

Summary = dict[str, Any]
Column = tuple[str, Callable[[Summary, Summary], str]]  # heading, cell(row, conventional row)
NAMES = {
    "wiki2": "WikiText-2",
    "wiki103": "WikiText-103",
    "lambada": "LAMBADA",
    "1b": "One Billion Words",
    "cifar10": "CIFAR-10",
}
ABLATIONS = {
    "conventional": "conventional",
    "dynamic": "dynamic",
    "final": "final architecture from the start",
    "retrained": "the same, with another seed",
    "permuted": "recorded decisions, layers permuted",
    "frozen": "without tying: layers are frozen",
}


def results_page(results: dict[str, Any]) -> str:
    """Markdown of all tables that have a row."""
    rows = {entry["row"]: entry["summary"] for entry in results["rows"]}
    parts = [
        "# Results",
        *_introduction(results["rows"]),
        *_section("Language models, conventional and dynamic", _language(rows)),
        *_section("Ablations, GPT-2 on WikiText-2", _ablations(rows)),
        *_section("BERT and ViT", _others(rows)),
        *_section("GLUE, dev", _glue(rows)),
        *_not_run(results["not_run"]),
    ]
    return "\n\n".join(parts) + "\n"


def _introduction(entries: Sequence[dict[str, Any]]) -> list[str]:
    if not entries:
        return ["No row has been run yet: `make paper-small`."]
    hours = sum(sum(entry["summary"]["seconds"].values()) for entry in entries) / 3600
    machines = sorted({_machine(entry) for entry in entries})
    seeds = sorted({entry["seed"] for entry in entries})
    return [
        "No row here shows that depth pays: no plain model of fewer layers was trained next to the "
        "conventional one. The figures compare ways of training with each other and say nothing "
        "about what sharing can gain ([quality](quality.md)).",
        "The rows of the paper at a small scale: 12 layers x 128 instead of 48 x 1,600, a learned "
        "vocabulary of 4,096, a few hundred steps. They can be compared with each "
        "other, but not with the paper's. Written by `make paper-small`; the figures are in "
        "`benchmarks/results/paper-small.json`, with each row's command and configuration.",
        f"{len(entries)} rows took {hours:.1f} hours of one thread each, on {'; '.join(machines)}. "
        f"Seeds: {', '.join(map(str, seeds))}. Each row is one run: differences of a few per cent "
        f"may be chance.",
        "Perplexities are of the test split, at the weights that were best on validation. "
        "*Independent* is the number of independent layers, *trainable* that of trainable "
        "parameters: mean over training, and at the end. *State* is the peak of parameters, "
        "gradients and optimizer state. *Of conv.* is the share of the conventional run's on the "
        "same data: below 100 % is less. For the time of a step see [performance](performance.md).",
    ]


def _machine(entry: dict[str, Any]) -> str:
    versions, hardware = entry["versions"], entry["hardware"]
    return (
        f"{hardware['processor']} ({hardware['device']}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def _section(title: str, table: str) -> list[str]:
    return [f"## {title}", table] if table else []


def _number(key: str, digits: int = 2) -> Callable[[Summary, Summary], str]:
    def cell(row: Summary, conventional: Summary) -> str:
        value = row.get(key)
        is_number = isinstance(value, int | float) and math.isfinite(value)
        return f"{value:,.{digits}f}" if is_number else "-"

    return cell


def _scaled(key: str, unit: float, suffix: str) -> Callable[[Summary, Summary], str]:
    return lambda row, conventional: f"{row[key] / unit:,.2f} {suffix}"


def _share(key: str) -> Callable[[Summary, Summary], str]:
    def cell(row: Summary, conventional: Summary) -> str:
        return f"{row[key] / conventional[key]:.0%}" if conventional else "-"

    return cell


# fmt: off
COSTS: tuple[Column, ...] = (
    ("independent, mean", _number("independent_layers_mean")),
    ("independent, end", _number("independent_layers_end", 0)),
    ("trainable, mean", _scaled("trainable_parameters_mean", 1e6, "M")),
    ("trainable, end", _scaled("trainable_parameters_end", 1e6, "M")),
    ("state", _scaled("model_state_bytes_peak", 1e6, "MB")),
    ("state of conv.", _share("model_state_bytes_peak")),
)
# fmt: on
PERPLEXITY: tuple[Column, ...] = (
    ("perplexity", _number("test_perplexity")),
    ("of conv.", _share("test_perplexity")),
)
TEXT: tuple[Column, ...] = (
    *PERPLEXITY,
    ("per word", _number("test_word_perplexity")),
    ("bits/byte", _number("bits_per_byte", 3)),
)


def _table(
    rows: Iterable[tuple[str, Summary, Summary]], columns: Sequence[Column], first: str = "row"
) -> str:
    """Markdown of the rows, given as name, summary and summary of the conventional run."""
    lines = [
        [name, *(cell(row, conventional) for _, cell in columns)]
        for name, row, conventional in rows
    ]
    return markdown_table([first, *(heading for heading, _ in columns)], lines) if lines else ""


def _pairs(rows: dict[str, Summary], prefix: str, names: dict[str, str]) -> list[Any]:
    conventional = rows.get(f"{prefix}-conventional", {})
    return [
        (label, rows[f"{prefix}-{name}"], conventional)
        for name, label in names.items()
        if f"{prefix}-{name}" in rows
    ]


def _language(rows: dict[str, Summary]) -> str:
    both = ("conventional", "dynamic")
    lines = [
        line
        for dataset in ("wiki2", "wiki103", "lambada", "1b")
        for line in _pairs(
            rows, f"gpt2-{dataset}", {side: f"{NAMES[dataset]}, {side}" for side in both}
        )
    ]
    return _table(lines, (*TEXT, ("last word", _number("last_word_accuracy", 3)), *COSTS))


def _ablations(rows: dict[str, Summary]) -> str:
    return _table(_pairs(rows, "gpt2-wiki2", ABLATIONS), (*TEXT, *COSTS))


def _others(rows: dict[str, Summary]) -> str:
    both = ("conventional", "dynamic")
    bert = _pairs(rows, "bert-wiki2", {side: f"BERT, WikiText-2 (masked), {side}" for side in both})
    vit = _pairs(rows, "vit-cifar10", {side: f"ViT, CIFAR-10, {side}" for side in both})
    return _table([*bert, *vit], (*PERPLEXITY, ("accuracy", _number("accuracy", 3)), *COSTS))


def _glue(rows: dict[str, Summary]) -> str:
    """A row a task and metric, a column a tying."""
    lines = []
    for task, record in FORMATS.items():
        found = {tying: rows.get(f"glue-{task}-{tying}", {}) for tying in TYINGS}
        if any(found.values()):
            for name in record.metrics:
                title = METRICS[name].title
                lines.append((f"{task}, {title}", {t: row.get(name) for t, row in found.items()}))
            layers = {t: row.get("independent_layers_mean") for t, row in found.items()}
            lines.append((f"{task}, independent layers, mean", layers))
    columns = [
        ("the run's tying kept", _number("keep", 3)),
        ("dynamic", _number("dynamic", 3)),
        ("conventional", _number("none", 3)),
    ]
    return _table([(name, row, {}) for name, row in lines], columns, first="task")


def _not_run(reasons: dict[str, str]) -> list[str]:
    missing = [f"- `{name}`: {reason}" for name, reason in reasons.items()]
    return ["## Could not be run", "\n".join(missing)] if missing else []
