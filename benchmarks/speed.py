"""How fast tied training is compared with conventional training, part by part.

Sides that are compared take turns in one process, and what is compared is the fastest of their
repeats, so that other work on the machine affects neither more. bf16 weights, fused AdamW, one
sequence a step.

- ``steps``: forward, backward and optimizer of a step: conventional, ``sum`` and ``owner``.
- ``decision``: a decision of the agent, with its transition and evaluation, in training steps.
- ``mixture``: a step of learned mixtures against one of a tied model, of 1,024 tokens.
- ``compile``: compiled layers against eager ones, and graphs compiled over 20 transitions, in the
  setting in which the command trains.
- ``generate``: tokens a second with a KV cache, loaded compactly and expanded.
- ``load``: the time and memory of loading each.

    python benchmarks/speed.py            # 13 minutes on two CPU cores; goes on if stopped
    python benchmarks/speed.py --quick    # a small model, a minute, into runs/quick
    python benchmarks/speed.py --parts steps compile
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator

from common import Case, arguments, batch, measure_all, random_tying, run_case_or
from performance_page import write_page
from speed_compile import measure_compile
from speed_generate import FORMATS, measure_generation, measure_loading, write_export
from speed_mixture import measure_mixture
from speed_sides import both_sides, fastest, now, side, timed_step

from layer_tying.core.tied_layers import TiedLayers
from layer_tying.dynamic import DynamicTying
from layer_tying.tasks.cross_entropy import language_model_loss
from layer_tying.tasks.evaluation import evaluating

LARGE = {"layers": 48, "width": 1600, "heads": 25, "independent": 7, "length": 256, "repeats": 3}
SMALL = {"layers": 12, "width": 768, "heads": 12, "independent": 3, "length": 256, "repeats": 7}
QUICK_SHAPE = SMALL | {"width": 256, "heads": 4, "length": 64, "repeats": 3}
COMPILED = {  # as the command trains, so of its sizes
    "gpt2": {"layers": 12, "width": 128, "heads": 4, "independent": 3, "repeats": 15},
    "llama": {"layers": 12, "width": 128, "heads": 4, "independent": 3, "repeats": 15},
}


def measure_steps(case: Case) -> Case:
    """Forward, backward, optimizer: conventional, sum and owner in turn."""
    conventional, tied = both_sides(case)
    repeats: dict[str, list[dict[str, float]]] = {"conventional": [], "sum": [], "owner": []}
    for repeat in range(case["repeats"] + 1):
        for name, times in repeats.items():
            if name != "conventional":  # the same model reads its weights anew
                TiedLayers(tied[0], gradient=name)  # type: ignore[arg-type]
            model = conventional if name == "conventional" else tied
            seconds = timed_step(*model, case["length"])
            if repeat:  # the first one warms up
                times.append(seconds)
    minima = {name: fastest(times) for name, times in repeats.items()}
    ratios = {
        name: {part: minima[name][part] / whole for part, whole in minima["conventional"].items()}
        for name in ("sum", "owner")
    }
    return {"seconds": minima, "of_conventional": ratios}


def measure_decision(case: Case) -> Case:
    """Decisions of the agent, each between two training steps."""
    tying = random_tying(case["layers"], case["independent"], seed=0)
    model, optimizer = side(case, tying)
    dynamic = DynamicTying(model, optimizer, "dqn", every=1, initial="keep")
    steps, decisions = [], []

    def reward() -> float:
        with evaluating(model):
            return -language_model_loss(model, *batch(case["length"], seed=1)).item()

    for repeat in range(case["repeats"] + 1):
        seconds = timed_step(model, optimizer, case["length"])["step"]
        start = now()
        dynamic.step(reward=reward)
        if repeat:
            steps.append(seconds)
            decisions.append(now() - start)
    step, decision = min(steps), statistics.median(decisions)
    return {
        "step_seconds": step,
        "decision_seconds": decision,
        "decision_in_steps": decision / step,
        "share_at_every_50": decision / (50 * step + decision),
    }


PARTS = {
    "steps": measure_steps,
    "decision": measure_decision,
    "mixture": measure_mixture,
    "compile": measure_compile,
    "generate": measure_generation,
    "load": measure_loading,
    "export": write_export,  # for "load"
}


def main() -> None:
    parts = [part for part in PARTS if part != "export"]
    options = arguments(__doc__, "speed.json", parts=parts)
    measure_all(__file__, cases(options.quick, options.parts), options, line, write_page)


def cases(is_quick: bool, parts: Iterable[str]) -> Iterator[Case]:
    for shape in (QUICK_SHAPE,) if is_quick else (LARGE, SMALL):
        for part in parts:
            if part == "load":
                yield from ({"part": part, **shape, "format": format} for format in FORMATS)
            elif part == "mixture":
                tokens = {"length": 64 if is_quick else 1024, "sequences": 1}
                for checkpointing in (True,) if shape is LARGE else (True, False):
                    yield {"part": part, **shape, **tokens, "checkpointing": checkpointing}
            elif part != "compile":
                yield {"part": part, **shape}
    if "compile" in parts:
        for family, small in COMPILED.items():
            yield {"part": "compile", "family": family, **small}
        if not is_quick:
            yield {"part": "compile", "family": "gpt2", **SMALL}


def line(row: Case, rows: list[Case]) -> str:
    name = f"{row['layers']} x {row['width']}, {row['part']} {row.get('format', '')}".strip()
    shown = {key: value for key, value in row.items() if key not in LARGE and key != "part"}
    return f"{name}: {shown}"


if __name__ == "__main__":
    run_case_or(main, lambda case: PARTS[case["part"]](case))
