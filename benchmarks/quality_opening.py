"""The opening of docs/quality.md: who wins where, by how much, and at what cost in time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quality_rows import (
    GATE,
    Groups,
    Row,
    best_fixed,
    common_seeds,
    gap_closed,
    gate,
    mean,
    ratio,
    step_seconds,
    steps_to,
)
from quality_settings import Setting, half_as_deep

from layer_tying.report.markdown import markdown_table

PARAMETERS = "trainable_parameters_mean"
HEADS = (
    *("setting, k of L", "against L layers", "against k layers", "against best fixed"),
    *("gap closed", "parameters", "depth is worth", "seeds"),
)
CAPTION = (
    "Mixtures are compared by the ratio of test perplexities, or by the difference of test "
    "accuracies, over the seeds that both sides have; *best fixed* is the best fixed pattern of k "
    "groups with 1/n scaling. The parameters are a share of those of the L layers. Depth is worth "
    "what L layers take off the perplexity, or the error, of k layers."
)


@dataclass(frozen=True)
class Found:
    """A setting in which depth pays, and the share of the gap that mixtures close there."""

    name: str
    setting: Setting
    groups: Groups
    gap: float


def what_holds(settings: Mapping[str, tuple[Setting, Groups]]) -> str:
    """The gates, a table of mixtures against their rivals, the worst first, and their times."""
    shares = {name: gate(groups, setting) for name, (setting, groups) in settings.items()}
    passed = [name for name, share in shares.items() if share is not None and share <= GATE]
    failed = [name for name, share in shares.items() if share is not None and share > GATE]
    found = [
        Found(name, *settings[name], gap)
        for name in passed
        if (gap := gap_closed(settings[name][1], settings[name][0], _mixture(settings[name][0])))
        is not None
    ]
    found.sort(key=lambda each: each.gap)
    parts = [_answer(found), _gate(len(passed), failed)]
    if found:
        parts += [markdown_table(HEADS, map(_cells, found)), CAPTION]
    times = [
        _time(each.name, ours, each.setting, each.groups)
        for each in found
        if not each.setting.accuracy  # the perplexity of a task that is solved has no meaning
        for ours in (_mixture(each.setting), half_as_deep(each.setting))
    ]
    parts.append("\n".join(f"- {sentence}" for sentence in times if sentence))
    return "\n\n".join(part for part in parts if part)


def in_the_papers_model(rows: Iterable[Mapping[str, Any]]) -> str:
    """The same comparison in the paper's GPT-2, from the rows of the page of results."""
    figures: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        figures.setdefault(row["row"].removeprefix("gpt2-wiki2-"), {})[row["seed"]] = row["summary"]
    ours, deep = figures["mixture"], figures["conventional"]
    seeds = sorted(ours.keys() & deep.keys())

    def of(rival: str, name: str) -> float:
        theirs = figures[rival]
        return statistics.fmean(ours[s][name] for s in seeds) / statistics.fmean(
            theirs[s][name] for s in seeds
        )

    return (
        f"The paper's GPT-2 (12 layers x 64, the bytes of WikiText-2; [results](results.md)): "
        f"mixtures of three sets have {of('conventional', 'test_perplexity'):.3f} times the "
        f"perplexity of twelve layers with {of('conventional', PARAMETERS):.0%} of the parameters, "
        f"{of('shallow', 'test_perplexity'):.3f} times that of three layers and "
        f"{of('cycle', 'test_perplexity'):.3f} times that of `cycle` with 1/n scaling (seeds: "
        f"{len(seeds)}). The learning rate is the best of three for the twelve layers."
    )


def _answer(found: Sequence[Found]) -> str:
    if not found:
        return ""
    gaps = [each.gap for each in found]
    shares = [_share_of_parameters(each) for each in found]
    return (
        f"**Learned mixtures of k shared sets of weights close {min(gaps):.0%} to {max(gaps):.0%} "
        f"of the gap between k conventional layers and L of them, with {min(shares):.0%} to "
        f"{max(shares):.0%} of the parameters of the L layers.** The setting in which they close "
        f"least comes first."
    )


def _gate(num_passed: int, failed: Sequence[str]) -> str:
    shut = ", ".join(f"`{name}`" for name in failed)
    ending = f" {shut} did not pass and {_is(failed)} not compared." if failed else ""
    return (
        f"Depth pays in {num_passed} of {num_passed + len(failed)} settings: the perplexity, or "
        f"the error, of L conventional layers is at least {1 - GATE:.0%} lower than that of k "
        f"layers.{ending}"
    )


def _is(many: Sequence[str]) -> str:
    return "are" if len(many) > 1 else "is"


def _mixture(setting: Setting) -> str:
    return f"mixture-{setting.sets[0]}"


def _share_of_parameters(found: Found) -> float:
    ours, deep = found.groups[_mixture(found.setting)], found.groups[found.setting.deep]
    return mean(ours, PARAMETERS) / mean(deep, PARAMETERS)


def _cells(found: Found) -> list[str]:
    setting, groups = found.setting, found.groups
    ours, deep, rival = _mixture(setting), setting.deep, setting.rival
    fixed = best_fixed(groups, setting)
    worth = gate(groups, setting)
    assert worth is not None
    return [
        f"`{found.name}`, {rival.rpartition('-')[2]} of {deep.rpartition('-')[2]}",
        *(_against(groups, setting, ours, other) for other in (deep, rival, fixed)),
        f"{found.gap:.0%}",
        f"{_share_of_parameters(found):.0%}",
        f"{1 - worth:.1%}",
        str(len(common_seeds(groups, ours, deep, rival))),
    ]


def _against(groups: Groups, setting: Setting, ours: str, other: str | None) -> str:
    """The ratio of the perplexities, or the difference of the accuracies in points."""
    compared = ratio(groups, setting, ours, other) if other else None
    if compared is None or other is None:
        return ""
    if not setting.accuracy:
        return f"{compared:.3f} times"
    seeds = common_seeds(groups, ours, other)
    one, another = ([r for r in groups[m] if r["seed"] in seeds] for m in (ours, other))
    points = f"{_points(one, another, 'test_accuracy')} points"
    hops = sorted(name for name in one[0] if name.startswith("test_accuracy_k"))
    hardest = [f" (of {name[-1]} hops {_points(one, another, name)})" for name in hops[-1:]]
    return points + "".join(hardest)


def _points(ours: Sequence[Row], theirs: Sequence[Row], name: str) -> str:
    points = round(100 * (mean(ours, name) - mean(theirs, name)), 1)
    return f"{points:+.1f}" if points else "0.0"


def _time(name: str, ours: str, setting: Setting, groups: Groups) -> str:
    """When a mixture gets near the deep model, and past the shallow one, by their times."""
    near = _time_to(groups, ours, setting.deep, 1.05)
    past = _time_to(groups, ours, setting.rival, 1.0)
    if near is None and past is None:
        return ""
    deep = f"within 5 % of the final validation perplexity of `{setting.deep}`"
    to_deep = (
        f"comes {deep} in {near:.2f} times the time that `{setting.deep}` trained"
        if near
        else f"does not come {deep}"
    )
    to_rival = (
        f"reaches that of `{setting.rival}` in {past:.1f} times its training time"
        if past
        else f"does not reach that of `{setting.rival}`"
    )
    return f"`{name}`, against time: `{ours}` {to_deep}, and {to_rival}."


def _time_to(groups: Groups, ours: str, other: str, factor: float) -> float | None:
    """The time to the other's final figure times a factor, by the time that the other trained."""
    shares = []
    for row in groups.get(ours, []):
        for rival in groups.get(other, []):
            if row["seed"] == rival["seed"]:
                trained, _, final = rival["curve"][-1]
                reached = steps_to(row, final * factor)
                if reached is None:
                    return None
                shares.append(reached / trained)
    if not shares:
        return None
    step, others_step = step_seconds(groups[ours]), step_seconds(groups[other])
    if step is None or others_step is None:
        return None
    return statistics.fmean(shares) * step / others_step
