"""The page of results, generated from the results file of the paper's rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from layer_tying.paper.gates import GATES, passed, problem, worth_of_depth
from layer_tying.paper.published import GPT2_WIKITEXT2
from layer_tying.paper.seeds import Summary, compared, over_seeds, share
from layer_tying.report import results_tables as tables
from layer_tying.report.results_tables import OTHERS, RIVALS, WIKITEXT

PERPLEXITY, PARAMETERS = "test_perplexity", "trainable_parameters_mean"
SHORT = {  # what stands in the page's first sentences
    "dynamic": "the agent",
    "shallow": "a quarter of the layers",
    "mixture": "learned mixtures",
}

PICTURES = (
    "![Validation perplexity against tokens](images/results-curves.png)",
    "![Which layer uses whose weights, over the agent's decisions](images/results-tying.png)",
    "Above: validation perplexity against tokens, with the standard deviation where a method has "
    "several seeds; the legend says how many are drawn. "
    "Below: whose weights each layer uses after each decision of the paper's agent; a stroke marks "
    "an independent layer.",
)


def results_page(results: dict[str, Any], findings: Iterable[str] = ()) -> str:
    """Markdown of all comparisons whose conventional side has learned, and why others are absent.

    Args:
        results: the file of results, see ``paper.results``.
        findings: paragraphs on what other experiments have shown.
    """
    rows = over_seeds(results["rows"])
    missing = {name: reason for name in GATES if (reason := problem(name, rows))}
    shown = {name: row for name, row in rows.items() if not name.startswith(tuple(missing))}
    parts = [
        "# Results",
        *_answer(shown),
        *_not_shown(missing),
        *_gates_passed(rows, missing),
        *_section("WikiText-2: rivals and ablations", tables.rivals(shown)),
        *(_beside_the_paper(shown) if f"{WIKITEXT}-dynamic" in shown else ()),
        *(PICTURES if f"{WIKITEXT}-dynamic" in shown else ()),
        *_section("Other texts", tables.language(shown)),
        *_section("BERT and ViT", tables.others(shown)),
        *_section("GLUE, dev", tables.glue(shown)),
        *tables.glue_that_says_nothing(shown),
        *findings,
        *_introduction(results["rows"]),
        *_not_run(results["not_run"]),
    ]
    return "\n\n".join(parts) + "\n"


def _answer(rows: dict[str, Summary]) -> list[str]:
    """What the rows of WikiText-2 say, in a few sentences; the bad news first."""
    sides = {side: side for side in RIVALS}
    pairs = {side: pair for side, *pair in compared(rows, WIKITEXT, sides)}
    worth = worth_of_depth(WIKITEXT, rows)

    def of_conventional(side: str, key: str = PERPLEXITY) -> float | None:
        if side not in pairs:
            return None
        row, conventional = pairs[side]
        return share(row, conventional, key)

    agent, quarter = of_conventional("dynamic"), of_conventional("shallow")
    if worth is None or agent is None or quarter is None:
        return []
    others = [
        f"{what} {ratio:.3f}"
        for side, what in (
            ("random", "random changes instead of the agent's have"),
            ("final", "the pattern that the agent ended with, trained from the start,"),
            ("cycle", "the fixed pattern `cycle` of a quarter of the layers"),
            ("mixture", "learned mixtures of a quarter of the layers"),
        )
        if (ratio := of_conventional(side)) is not None
    ]
    of_a_quarter = (
        f"A conventional model of a quarter of the layers has {quarter:.3f} times the "
        f"conventional perplexity, with {of_conventional('shallow', PARAMETERS):.0%} of the "
        f"parameters"
    )
    sentences = [
        f"On WikiText-2, where the full model has {worth:.1%} lower perplexity than one with a "
        f"quarter of its layers, the paper's agent has {agent:.3f} times the perplexity of "
        f"conventional training, with {of_conventional('dynamic', PARAMETERS):.0%} of its "
        f"trainable parameters on average.",
        "; ".join([of_a_quarter, *others]) + ".",
        f"Over the run, the agent's parameters, gradients and optimizer state take "
        f"{of_conventional('dynamic', 'model_state_bytes_mean'):.0%} of the conventional memory on "
        f"average and {of_conventional('dynamic', 'model_state_bytes_peak'):.0%} at the peak.",
    ]
    return [" ".join([*sentences, *_of_other_families(rows)])]


def _of_other_families(rows: dict[str, Summary]) -> list[str]:
    """A sentence each on BERT and ViT: what the agent and its rivals have of the perplexity."""
    sentences = []
    for prefix, name in OTHERS.items():
        found = {
            what: share(row, deep, PERPLEXITY) for what, row, deep in compared(rows, prefix, SHORT)
        }
        ratios = {what: f"{ratio:.3f}" for what, ratio in found.items() if ratio is not None}
        if agent := ratios.pop(SHORT["dynamic"], None):
            others = "".join(f", {what} {ratio}" for what, ratio in ratios.items())
            sentences.append(
                f"{name}: the agent has {agent} times the conventional perplexity{others}."
            )
    return sentences


def _gates_passed(rows: dict[str, Summary], missing: dict[str, str]) -> list[str]:
    lines = [
        f"- {gate.about}: {passed(name, rows)}."
        for name, gate in GATES.items()
        if name not in missing
    ]
    return (
        ["Included, because the conventional side has learned:", "\n".join(lines)] if lines else []
    )


def _not_shown(missing: dict[str, str]) -> list[str]:
    if not missing:
        return []
    lines = [f"- {GATES[name].about}: {reason}." for name, reason in missing.items()]
    text = "Omitted, because the conventional model was not trained or did not pass its gate:"
    return [text, "\n".join(lines)]


def _introduction(entries: Sequence[dict[str, Any]]) -> list[str]:
    if not entries:
        return ["No row has been run yet: `make paper-small`."]
    hours = sum(sum(entry["summary"]["seconds"].values()) for entry in entries) / 3600
    machines = sorted({_machine(entry) for entry in entries})
    seeds = sorted({entry["seed"] for entry in entries})
    return [
        "## How it was measured",
        "The rows of the paper at a small scale: GPT-2 of 12 layers x 64 on bytes, 10,000 steps of "
        "8 x 64, instead of 48 x 1,600. They can be compared with each other, but not with the "
        "paper's. The learning rate, 0.004, is the best of 0.002, 0.004 and 0.008 for the "
        "conventional row on validation (`paper-rates.json`); all rows of GPT-2 have it. LAMBADA "
        "is its test passages and One Billion Words one held-out shard, each cut into 90 % to "
        "train, 5 % to validate and 5 % to test. GLUE starts from the models of WikiText-2 in "
        "4,096 subwords, which train for 4,000 steps of 16 x 128, and is fine-tuned for three "
        "epochs (SST-2: two, QNLI: one). BERT trains for 5,000 steps of 64 x 64 bytes at a rate of "
        "0.002, and ViT for ten epochs in batches of 32 images at 0.0005; their initial weights "
        "have standard deviations of 0.04 and 0.06. All this was chosen on validation as well (see "
        "the [log](log.md)). Written by `make paper-small`; the figures are in "
        "`benchmarks/results/paper-small.json`, with each row's command and configuration.",
        f"{len(entries)} runs took {hours:.1f} hours of one thread, on {'; '.join(machines)}. "
        f"Seeds: {', '.join(map(str, seeds))}. Where a row has one seed, differences of a few per "
        f"cent may be chance.",
        "Perplexities are of the test split, at the weights that were best on validation, with the "
        "standard deviation over seeds. *Independent* is the number of independent layers, "
        "*trainable* that of trainable parameters: mean over training, and at the end. *State* is "
        "parameters, gradients and optimizer state, mean and peak over the run. *Of conv.* is the "
        "share of the conventional run's on the same data and of the same seeds: below 100 % is "
        "less. For the time of a step see [performance](performance.md).",
    ]


def _machine(entry: dict[str, Any]) -> str:
    versions, hardware = entry["versions"], entry["hardware"]
    return (
        f"{hardware['processor']} ({hardware['device']}), torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def _section(title: str, table: str) -> list[str]:
    return [f"## {title}", table] if table else []


def _beside_the_paper(rows: dict[str, Summary]) -> list[str]:
    """The ratio of the two sides in the paper, and here."""
    theirs = [GPT2_WIKITEXT2[side][PERPLEXITY] for side in ("dynamic", "conventional")]
    ((_, agent, deep),) = compared(rows, WIKITEXT, {"dynamic": ""})
    ours = share(agent, deep, PERPLEXITY)
    if ours is None:
        return []
    return [
        f"The paper gives perplexities of {theirs[0]} with its agent and {theirs[1]} without, for "
        f"48 layers x 1,600: {theirs[0] / theirs[1]:.3f} times the conventional one, against "
        f"{ours:.3f} at this scale."
    ]


def _not_run(reasons: dict[str, str]) -> list[str]:
    missing = [f"- `{name}`: {reason}" for name, reason in reasons.items()]
    return ["## Could not be run", "\n".join(missing)] if missing else []
