"""The tables of the page of results: which rows are compared, and what is shown of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from layer_tying.data.glue import FORMATS
from layer_tying.paper.rows import SUBWORDS, TYINGS
from layer_tying.paper.seeds import Summary, compared, is_number, share
from layer_tying.report.markdown import markdown_table
from layer_tying.tasks.metrics import METRICS

Column = tuple[str, Callable[[Summary, Summary], str]]  # heading, cell(row, conventional row)
NAMES = {
    "wiki2": "WikiText-2",
    "wiki103": "WikiText-103",
    "lambada": "LAMBADA",
    "1b": "One Billion Words",
    SUBWORDS: "WikiText-2 in subwords",
}
WIKITEXT = "gpt2-wiki2"
OTHER_TEXTS = {f"gpt2-{name}": NAMES[name] for name in ("wiki103", "lambada", "1b", SUBWORDS)}
TRIPLE = {
    "conventional": "conventional",
    "shallow": "conventional, a quarter of the layers",
    "dynamic": "the paper's agent",
}
MIXTURE = {"mixture": "learned mixtures, uses scaled by 1/n"}
RIVALS = {
    **TRIPLE,
    "random": "random changes",
    "final": "the pattern that the agent found, from the start",
    "retrained": "the same, with another seed",
    "permuted": "the agent's decisions, layers permuted",
    "frozen": "the agent, layers frozen instead of tied",
    "cycle": "fixed pattern `cycle`, uses scaled by 1/n",
    **MIXTURE,
}
ABOVE_MAJORITY = 0.05  # accuracy that a model of GLUE has learned something with
OTHERS = {"bert-wiki2": "BERT, masked tokens of WikiText-2", "vit-cifar10": "ViT, CIFAR-10"}


def _number(key: str, digits: int = 2) -> Callable[[Summary, Summary], str]:
    def cell(row: Summary, conventional: Summary) -> str:
        value = row.get(key)
        if not is_number(value):
            return "-"
        deviation = row.get(f"{key}_deviation")
        return f"{value:,.{digits}f}" + (f" ± {deviation:,.{digits}f}" if deviation else "")

    return cell


def _scaled(key: str, unit: float, suffix: str) -> Callable[[Summary, Summary], str]:
    def cell(row: Summary, conventional: Summary) -> str:
        return f"{row[key] / unit:,.2f} {suffix}" if is_number(row.get(key)) else "-"

    return cell


def _share(key: str) -> Callable[[Summary, Summary], str]:
    def cell(row: Summary, conventional: Summary) -> str:
        found = share(row, conventional, key)
        return "-" if found is None else f"{found:.1%}"

    return cell


# fmt: off
COSTS: tuple[Column, ...] = (
    ("independent, mean", _number("independent_layers_mean")),
    ("independent, end", _number("independent_layers_end")),
    ("trainable, mean", _scaled("trainable_parameters_mean", 1e6, "M")),
    ("trainable, end", _scaled("trainable_parameters_end", 1e6, "M")),
    ("state, mean", _scaled("model_state_bytes_mean", 1e6, "MB")),
    ("of conv.", _share("model_state_bytes_mean")),
    ("state, peak", _scaled("model_state_bytes_peak", 1e6, "MB")),
    ("of conv.", _share("model_state_bytes_peak")),
    ("seeds", _number("seeds", 0)),
)
# fmt: on
PERPLEXITY: tuple[Column, ...] = (
    ("perplexity", _number("test_perplexity", 3)),
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


def language(rows: dict[str, Summary]) -> str:
    """The paper's agent and conventional models on other texts."""
    lines = [
        line
        for prefix, dataset in OTHER_TEXTS.items()
        for line in compared(
            rows, prefix, {side: f"{dataset}, {what}" for side, what in TRIPLE.items()}
        )
    ]
    return _table(lines, (*TEXT, ("last word", _number("last_word_accuracy", 3)), *COSTS))


def rivals(rows: dict[str, Summary]) -> str:
    """The agent's rivals and ablations on WikiText-2."""
    return _table(compared(rows, WIKITEXT, RIVALS), (*TEXT, *COSTS))


def others(rows: dict[str, Summary]) -> str:
    """BERT and ViT."""
    sides = TRIPLE | MIXTURE
    lines = [
        line
        for prefix, name in OTHERS.items()
        for line in compared(rows, prefix, {s: f"{name}, {what}" for s, what in sides.items()})
    ]
    accuracies = (
        ("accuracy", _number("accuracy", 3)),
        ("masked tokens", _number("masked_accuracy", 3)),
    )
    return _table(lines, (*PERPLEXITY, *accuracies, *COSTS))


def glue(rows: dict[str, Summary]) -> str:
    """A row a task and metric, a column a tying."""
    lines = []
    for task, record in FORMATS.items():
        found = {tying: rows.get(f"glue-{task}-{tying}", {}) for tying in TYINGS}
        if any(found.values()):
            for name in record.metrics:
                title = METRICS[name].title
                by_tying = {tying: row.get(name) for tying, row in found.items()}
                if name == "accuracy":
                    by_tying["majority"] = _majority_share(found.values())
                lines.append((f"{task}, {title}", by_tying))
            layers = {t: row.get("independent_layers_mean") for t, row in found.items()}
            lines.append((f"{task}, independent layers, mean", layers))
    columns = [
        ("the run's tying kept", _number("keep", 3)),
        ("dynamic", _number("dynamic", 3)),
        ("conventional", _number("none", 3)),
        ("majority class", _number("majority", 3)),
    ]
    return _table([(name, row, {}) for name, row in lines], columns, first="task")


def glue_that_says_nothing(rows: dict[str, Summary]) -> list[str]:
    """The tasks whose conventional model is hardly better than always saying one class."""
    said = []
    for task in FORMATS:
        row = rows.get(f"glue-{task}-none", {})
        majority, reached = _majority_share([row]), row.get("accuracy")
        if majority is not None and is_number(reached) and reached < majority + ABOVE_MAJORITY:
            said.append(task)
    if not said:
        return []
    tasks = " and ".join(filter(None, [", ".join(said[:-1]), said[-1]]))
    return [
        f"On {tasks} the conventional model is less than {100 * ABOVE_MAJORITY:.0f} points better "
        f"than the majority class: it has learned next to nothing, and these rows say nothing "
        f"about sharing."
    ]


def _majority_share(found: Iterable[Summary]) -> float | None:
    shares = [row.get("data", {}).get("majority_share") for row in found]
    return next((share for share in shares if share is not None), None)
