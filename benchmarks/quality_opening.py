"""The opening of docs/quality.md: what holds and what does not, in five sentences."""

from __future__ import annotations

from collections.abc import Sequence

from quality_rows import FIXED, Groups, best_fixed, front_of, points_of, ratio


def what_holds(settings: Sequence[Groups]) -> str:
    """The sentences as a Markdown list, the bad news first.

    Args:
        settings: for each text and regime, the runs of each method at its best learning rate.
    """
    sentences = (
        _depth(settings),
        _equal_parameters(settings),
        _the_papers_agent(settings),
        _fixed_patterns(settings),
        _initial_weights(settings),
    )
    return "\n".join(f"- {sentence}" for sentence in sentences if sentence)


def _depth(settings: Sequence[Groups]) -> str:
    shares = _ratios(settings, "conventional", "conventional, 3 layers")
    if not shares:
        return ""
    pays = sum(share <= 0.95 for share in shares)
    return (
        f"Depth pays in {pays} of {len(shares)} settings, in the sense that a conventional model "
        f"of 12 layers beats one of 3 layers by at least 5 % ({_range(shares)} times its "
        f"perplexity); where it does not pay, the figures compare methods of sharing with each "
        f"other, and do not show what sharing can gain."
    )


def _equal_parameters(settings: Sequence[Groups]) -> str:
    shares = _ratios(settings, "bandit-3", "conventional, 3 layers")
    if not shares:
        return ""
    on_front = [groups for groups in settings if "bandit, priced" in groups and _on_front(groups)]
    priced = sum("bandit, priced" in groups for groups in settings)
    return (
        f"At equal parameters, the bandit beats the conventional model of 3 layers in "
        f"{_wins(shares)} settings ({_range(shares)} times its perplexity), and a number of layers "
        f"that it chooses itself is on the Pareto front in {len(on_front)} of {priced}."
    )


def _the_papers_agent(settings: Sequence[Groups]) -> str:
    shares = _ratios(settings, "bandit-3", "dqn")
    if not shares:
        return ""
    mark = "**" if max(shares) <= 1 else ""
    return (
        f"{mark}The bandit beats the paper's agent in {_wins(shares)} settings{mark}, with "
        f"{_range(shares)} times its perplexity."
    )


def _fixed_patterns(settings: Sequence[Groups]) -> str:
    parts = []
    for m in FIXED:
        found = ((g, best_fixed(g, m)) for g in settings)
        shares = [ratio(g, f"bandit-{m}", best) or 0.0 for g, best in found if best]
        if shares:
            parts.append(f"{_wins(shares)} settings with {m} independent layers")
    if not parts:
        return ""
    return (
        f"The bandit is at least as good as the best fixed pattern of its size in "
        f"{', '.join(parts)}."
    )


def _initial_weights(settings: Sequence[Groups]) -> str:
    fixed = _ratios(settings, "bandit-3", "sandwich-3")
    scaled = _ratios(settings, "bandit-3", "sandwich-3, 1/n")
    if not fixed or not scaled:
        return ""
    return (
        f"The bandit has {_range(fixed)} times the perplexity of `sandwich-3` with standard "
        f"initial weights, and {_range(scaled)} times that of `sandwich-3` with 1/n residual "
        f"scaling of the initial weights, from which it starts: the difference is the gain from "
        f"the scaling alone."
    )


def _ratios(settings: Sequence[Groups], one: str, other: str) -> list[float]:
    return [share for groups in settings if (share := ratio(groups, one, other)) is not None]


def _wins(shares: Sequence[float]) -> str:
    return f"{sum(round(share, 3) <= 1 for share in shares)} of {len(shares)}"


def _range(shares: Sequence[float]) -> str:
    return f"{min(shares):.2f} to {max(shares):.2f}"


def _on_front(groups: Groups) -> bool:
    return "bandit, priced" in front_of(points_of(groups, "model_state_bytes_mean"))
