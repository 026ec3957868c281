"""Writes docs/quality.md and its pictures from what benchmarks/quality.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from quality_pictures import draw_front, draw_panels, draw_patterns
from quality_rows import (
    FIXED,
    Groups,
    Row,
    at_best_rate,
    common_seeds,
    front_of,
    mean,
    points_of,
    rank_correlation,
    ratio,
)

from layer_tying.report.markdown import markdown_table


def write_page(results: Row, folder: Path) -> None:
    """The page and its pictures, into a folder of documentation."""
    rows = results["rows"]
    regimes = list(results["settings"])
    settings = sorted(
        {(r["set"], r["regime"]) for r in rows}, key=lambda s: (regimes.index(s[1]), s)
    )
    if not settings:
        return
    (folder / "images").mkdir(exist_ok=True)
    for name, draw in (("front", draw_front), ("patterns", draw_patterns)):
        figure = draw_panels(rows, settings, draw)
        figure.savefig(folder / "images" / f"quality-{name}.png", dpi=150)
    parts = ["# Quality", *_introduction(results), _VERDICTS, _verdicts(rows, settings)]
    parts += [_AIMS, *_PICTURES]
    for text, regime in settings:
        parts += [f"## {text}, {regime}", _table(at_best_rate(rows, text, regime))]
    page = "\n\n".join(parts) + "\n"
    (folder / "quality.md").write_text(page, encoding="utf-8")


def _introduction(results: Row) -> list[str]:
    rows = results["rows"]
    shapes: dict[str, list[str]] = {}  # what is trained -> in which regimes
    for regime, settings in results["settings"].items():
        steps = next(r["steps"] for r in rows if r["regime"] == regime)
        shapes.setdefault(_shape(settings, steps), []).append(regime)
    trained = "; ".join(f"{', '.join(regimes)}: {shape}" for shape, regimes in shapes.items())
    machine = sorted({r["hardware"]["processor"] for r in rows})
    versions = sorted({f"torch {r['versions']['torch']}" for r in rows})
    return [
        f"Which way of choosing what is shared trains the best model of a given size, with equal "
        f"data, order and seeds ({trained}). Each method had the same learning rates to "
        f"choose from, on validation with the first seed. Written by `make bench-quality` from "
        f"`benchmarks/results/quality.json`: {len(rows)} runs of one thread, "
        f"{', '.join(machine)}, {', '.join(versions)}.",
        "Perplexity is per token of the test text, at the weights that were best on validation; "
        "with several seeds the mean and the standard deviation; the rise after it is that of the "
        "validation perplexity from its best to the end of training. `bandit-M` starts from "
        "`sandwich-M` with 1/n residual scaling and keeps M independent layers; `bandit, priced` "
        "begins and ends groups as it likes. The runs are short: they compare the methods "
        "with each other, at this size and length. Where there is one seed only, a few per cent "
        "may be chance; what was tried on the way is in the [log](log.md).",
    ]


def _shape(settings: Row, steps: int) -> str:
    positions = {"llama": "rotary positions", "gpt2": "GPT-2's shape"}[settings["family"]]
    return (
        f"{settings['nlayers']} layers x {settings['emsize']}, {positions}, {steps} steps of "
        f"{settings['batch_size']} x {settings['bptt']} tokens"
    )


_PICTURES = (
    "![Perplexity against mean model state](images/quality-front.png)",
    "The label of a star is the bandit's M, that of a square the number of layers of a "
    "conventional model. The line is the Pareto front.",
    "![Perplexity by the number of independent layers](images/quality-patterns.png)",
    "The same perplexities by the mean number of independent layers: at equal size, what is "
    "shared decides, and how it starts. The best fixed pattern of each size is "
    "labelled; the dashed line is conventional training.",
)


_VERDICTS = (
    "The bandit's perplexity as a share of another method's (below 1: the bandit is better; "
    "**bold**: the target is met), over the seeds that both have; their number in brackets. The "
    "best fixed pattern is the best one with as many independent layers and standard initial "
    "weights."
)
_AIMS = (
    "The targets: at most 1.00 of the best fixed pattern, of the start that is kept to the end and "
    "of conventional training in one pass, 0.92 of it in many passes; less than random changes, "
    "which settle when the bandit does; a size chosen by itself that no other method beats in both "
    "perplexity and mean model state; 2 % of the time for decisions. The rank correlation is that "
    "of what the bandit's worths say of the fixed patterns of neighbouring layers (so many in "
    "brackets) with the perplexities that these had."
)
Cell = Callable[[Groups, str], str]  # of the methods' groups, in a regime


def _verdicts(rows: Sequence[Row], settings: Sequence[tuple[str, str]]) -> str:
    """What was aimed at, a line each, and what came of it for each text and regime."""
    lines: list[tuple[str, Cell]] = [
        *((f"M = {m}: of the best fixed pattern", _of_best_fixed(m)) for m in FIXED),
        ("M = 3: of conventional training", _of("conventional")),
        ("M = 3: of `sandwich-3`", _of("sandwich-3")),
        ("M = 3: of `sandwich-3, damped`, its start", _of("sandwich-3, damped")),
        ("M = 3: of `random`", _of("random")),
        ("M = 3: of `random, damped`", _of("random, damped")),
        ("M = 3: of the paper's agent", _of("dqn")),
        ("rank correlation", lambda groups, _: rank_correlation(groups)),
        ("size of its own: layers, on the front", _size_of_its_own),
        ("time of decisions", _time_of_decisions),
    ]
    columns = [(at_best_rate(rows, text, regime), regime) for text, regime in settings]
    heads = ["", *(f"{text}, {regime}" for text, regime in settings)]
    return markdown_table(
        heads, [[name, *(cell(*column) for column in columns)] for name, cell in lines]
    )


def _of_best_fixed(m: int) -> Cell:
    def cell(groups: Groups, _: str) -> str:
        ours = f"bandit-{m}"
        shares = {name: ratio(groups, ours, name) for name in FIXED[m]}
        known = {name: share for name, share in shares.items() if share}
        if not known:
            return ""
        best = max(known, key=lambda name: known[name])
        return f"{_share(groups, ours, best, 1.0)} {best}"

    return cell


def _of(rival: str) -> Cell:
    def cell(groups: Groups, regime: str) -> str:
        is_harder = (rival, regime) == ("conventional", "many-pass")
        return _share(groups, "bandit-3", rival, 0.92 if is_harder else 1.0)

    return cell


def _share(groups: Groups, ours: str, rival: str, most: float) -> str:
    share = ratio(groups, ours, rival)
    if share is None:
        return ""
    figure = f"**{share:.3f}**" if round(share, 3) <= most else f"{share:.3f}"
    return f"{figure} ({len(common_seeds(groups, ours, rival))})"


def _size_of_its_own(groups: Groups, _: str) -> str:
    if "bandit, priced" not in groups:
        return ""
    layers = mean(groups["bandit, priced"], "independent_layers_mean")
    is_on = "bandit, priced" in front_of(points_of(groups, "model_state_bytes_mean"))
    return f"{layers:.1f}, {'**yes**' if is_on else 'no'}"


def _time_of_decisions(groups: Groups, _: str) -> str:
    ours = [rows for name, rows in groups.items() if name.startswith("bandit")]
    if not ours:
        return ""
    most = max(mean(rows, "decision_overhead") for rows in ours)
    return f"**{most:.1%}**" if most <= 0.02 else f"{most:.1%}"


def _table(groups: Groups) -> str:
    heads = (
        *("method", "perplexity", "bits/byte", "validation", "rise after"),
        *("independent, mean", "end"),
        *("state, mean MB", "peak MB", "s/step", "decisions", "learning rate", "seeds"),
    )
    ordered = sorted(groups.items(), key=lambda item: mean(item[1], "test_perplexity"))
    return markdown_table(heads, (_cells(name, rows) for name, rows in ordered))


def _cells(name: str, rows: Sequence[Row]) -> list[str]:
    spread = [r["test_perplexity"] for r in rows]
    deviation = f" ± {statistics.stdev(spread):.3f}" if len(rows) > 1 else ""
    return [
        name,
        f"{statistics.fmean(spread):.3f}{deviation}",
        f"{mean(rows, 'bits_per_byte'):.3f}",
        f"{mean(rows, 'validation_perplexity'):.3f}",
        f"{mean(rows, 'rise_after_the_best'):.2f}",
        f"{mean(rows, 'independent_layers_mean'):.2f}",
        f"{mean(rows, 'independent_layers_end'):.1f}",
        f"{mean(rows, 'model_state_bytes_mean') / 1e6:.2f}",
        f"{mean(rows, 'model_state_bytes_peak') / 1e6:.2f}",
        f"{mean(rows, 'seconds_per_step'):.3f}",
        f"{mean(rows, 'decision_overhead'):.1%}",
        f"{rows[0]['lr']:g}",
        str(len(rows)),
    ]
