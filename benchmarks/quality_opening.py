"""The opening of docs/quality.md: who wins where, by how much, and at what cost in time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from quality_rows import (
    GATE,
    Groups,
    best_fixed,
    gap_closed,
    gate,
    mean,
    ratio,
    step_seconds,
    steps_to,
)
from quality_settings import Setting, half_as_deep

PARAMETERS = "trainable_parameters_mean"


def what_holds(settings: Mapping[str, tuple[Setting, Groups]]) -> str:
    """The sentences as a Markdown list, the bad news first."""
    open_, closed = [], []
    for name, (setting, groups) in settings.items():
        share = gate(groups, setting)
        if share is not None:
            (open_ if share <= GATE else closed).append((name, share))
    parts = [_gate(open_, closed)]
    for name, _ in open_:
        if settings[name][0].accuracy:  # the perplexity of a task that is solved has no meaning
            parts.append(_accuracy(name, *settings[name]))
        else:
            setting, groups = settings[name]
            parts.append(_perplexity(name, setting, groups))
            for ours in (f"mixture-{setting.sets[0]}", half_as_deep(setting)):
                parts.append(_time(name, ours, setting, groups))
    return "\n".join(f"- {part}" for part in parts if part)


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


def _gate(open_: list[tuple[str, float]], closed: list[tuple[str, float]]) -> str:
    found = ", ".join(f"{1 - share:.1%} in `{name}`" for name, share in [*open_, *closed])
    shut = ", ".join(f"`{name}`" for name, _ in closed)
    ending = f" {shut} did not pass and {_is(closed)} not compared." if closed else ""
    return (
        f"Depth pays in {len(open_)} of {len(open_) + len(closed)} settings: the perplexity (or "
        f"error) of L conventional layers is at least {1 - GATE:.0%} lower than that of k layers "
        f"({found or '-'}).{ending}"
    )


def _is(many: list[tuple[str, float]]) -> str:
    return "are" if len(many) > 1 else "is"


def _accuracy(name: str, setting: Setting, groups: Groups) -> str:
    ours = f"mixture-{setting.sets[0]}"
    methods = [ours, setting.deep, setting.rival]
    if not all(method in groups for method in methods):
        return ""
    hops = sorted(entry for entry in groups[ours][0] if entry.startswith("test_accuracy_k"))
    last = f" ({{:.1f}} with {hops[-1].removeprefix('test_accuracy_k')} hops)" if hops else ""

    def percent(method: str) -> str:
        rows = groups[method]
        entries = ["test_accuracy", *hops[-1:]]
        overall, *hardest = (100 * mean(rows, entry) for entry in entries)
        return f"{overall:.1f} %{last.format(*hardest)}"

    share = mean(groups[ours], PARAMETERS) / mean(groups[setting.deep], PARAMETERS)
    return (
        f"`{name}`: `{ours}` is right in {percent(ours)} with {share:.0%} of the parameters of "
        f"`{setting.deep}`, which is right in {percent(setting.deep)}; `{setting.rival}`, which "
        f"has as many parameters, is right in {percent(setting.rival)} "
        f"(seeds: {_seeds(groups, ours, setting.deep, setting.rival)})."
    )


def _perplexity(name: str, setting: Setting, groups: Groups) -> str:
    ours = f"mixture-{setting.sets[0]}"
    to_deep = ratio(groups, setting, ours, setting.deep)
    to_rival = ratio(groups, setting, ours, setting.rival)
    closed = gap_closed(groups, setting, ours)
    if to_deep is None or to_rival is None or closed is None:
        return ""
    share = mean(groups[ours], PARAMETERS) / mean(groups[setting.deep], PARAMETERS)
    fixed = best_fixed(groups, setting)
    to_fixed = ratio(groups, setting, ours, fixed) if fixed else None
    rest = f", and {to_fixed:.3f} times that of `{fixed}`" if to_fixed else ""
    seeds = _seeds(groups, ours, setting.deep, setting.rival)
    return (
        f"`{name}`: `{ours}` has {to_deep:.3f} times the perplexity of `{setting.deep}` with "
        f"{share:.0%} of its parameters; it has {to_rival:.3f} times that of `{setting.rival}`, "
        f"which has as many parameters{rest}. It closes {closed:.0%} of the gap between "
        f"`{setting.rival}` and `{setting.deep}` (seeds: {seeds})."
    )


def _seeds(groups: Groups, *methods: str) -> int:
    """How many seeds all of them have: those that are compared."""
    return len(set.intersection(*({row["seed"] for row in groups[m]} for m in methods)))


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
