"""The page of performance: ratios and verdicts are right, and what failed or is missing is said."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import performance_page
from performance_page import write_page
from performance_tables import memory_targets

ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "hardware": {"processor": "a processor", "device": "cpu", "threads": 2},
}
SHAPE = {"layers": 48, "width": 1600, "heads": 25, "length": 256}


def memory_row(independent: int, above_own: int, state: int, raised: int = 0, **changes) -> dict:
    return {
        **SHAPE,
        **{"independent": independent, "checkpointing": True, "own_bytes": 100_000_000},
        **{"peak_bytes": above_own + 100_000_000, "above_own_bytes": above_own},
        **{"model_state_bytes": state, "parameter_bytes": state // 4, "build_seconds": 1.5},
        **{
            "gradient_bytes": state // 4,
            "optimizer_state_bytes": state // 2,
            "block_state_bytes": 50,
        },
        **{"raised_by_transitions_bytes": raised, **changes},
    }


MEMORY = [
    memory_row(48, 12_000_000_000, 11_000_000_000),
    memory_row(7, 3_000_000_000, 2_000_000_000),
    memory_row(1, 1_000_000_000, 900_000_000, raised=60),
    {**SHAPE, "length": 1024, "independent": 48, "checkpointing": True, "error": "no memory"},
    memory_row(7, 4_000_000_000, 2_000_000_000, length=1024),
]
SIDE = {"layers": 12, "width": 768, "independent": 3}
STEP = {"forward": 1.0, "backward": 2.0, "optimizer": 0.5, "step": 3.5}
SPEED = [
    {
        **SIDE,
        "part": "steps",
        "seconds": {"conventional": STEP, "sum": STEP, "owner": STEP},
        "of_conventional": {
            "sum": dict.fromkeys(STEP, 0.95),
            "owner": dict.fromkeys(STEP, 0.85),
        },
    },
    {
        **{**SIDE, "part": "decision", "step_seconds": 2.0, "decision_seconds": 1.0},
        **{"decision_in_steps": 0.5, "share_at_every_50": 0.01},
    },
    {**SIDE, "part": "compile", "error": "no compiler"},
    {
        **{**SIDE, "part": "generate", "compact_of_expanded": 1.25},
        "tokens_per_second": {"compact": 5.0, "expanded": 4.0},
    },
]
ALTERNATIVE = {
    **{**SHAPE, "optimizer": "AdamW", "independent": 48, "checkpointing": False},
    **{"above_own_bytes": 12_000_000_000, "step_seconds": 10.0, "trained_parameters": 1.5e9},
    **{"optimizer_state_bytes": 6_000_000_000},
}
ALTERNATIVES = [
    ALTERNATIVE,
    ALTERNATIVE | {"independent": 7, "above_own_bytes": 4_000_000_000, "step_seconds": 9.0},
    {**SHAPE, "optimizer": "LoRA", "independent": 48, "checkpointing": True, "error": "no peft"},
]


@pytest.fixture
def page_of(tmp_path):
    def write(**results: list[dict]) -> str:
        for name, rows in results.items():
            content = {"command": "c", "environment": ENVIRONMENT, "rows": rows}
            (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return write_page(tmp_path).read_text(encoding="utf-8")

    return write


def cells_of(page: str, start: str) -> list[str]:
    (cells,) = [cells for cells in table_lines(page) if cells[0] == start]
    return cells


def table_lines(page: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def test_memory_is_compared_with_the_conventional_side_of_its_setting(page_of, tmp_path):
    page = page_of(memory=MEMORY)
    assert cells_of(page, "1")[1:6] == ["1,100", "1,000", "12.00x", "12.22x", "98%"]
    assert cells_of(page, "1")[9:11] == ["100", "+0"]
    long = page.partition("1 x 1,024 tokens, with gradient checkpointing**")[2]
    assert cells_of(long, "48, conventional")[1:3] == ["no memory", "-"]
    assert cells_of(long, "7")[1:6] == ["4,100", "4,000", "-", "-", "-"]
    assert cells_of(page, "the paper, as published")[1:] == ["12,566.66", "4,514.31", "2.78x"]
    assert (tmp_path / "images" / "memory.png").stat().st_size > 10_000


def test_every_target_is_held_against_what_was_measured(page_of):
    page = page_of(memory=MEMORY, speed=SPEED)
    verdicts = {
        start: (cells_of(page, start)[2], cells_of(page, start)[3])
        for start in (
            "times less memory above the baseline, 1 x 256, 7 independent",
            "share of the bound, 1 x 256, 7 independent",
            "share of the bound, 1 x 256, 1 independent",
            "peak raised by transitions, at most (limit: a block's state)",
            "step of conventional, `sum`, 12 x 768, 3 independent",
            "step of conventional, `owner`, 12 x 768, 3 independent",
            "a decision, in steps, 12 x 768, 3 independent",
            "the agent at every = 50, 12 x 768, 3 independent",
        )
    }
    assert list(verdicts.values()) == [
        *(("4.00", "no"), ("73%", "no"), ("98%", "**yes**"), ("0 MB", "no")),
        *(("0.95", "**yes**"), ("0.85", "no"), ("0.50", "**yes**"), ("1.0%", "**yes**")),
    ]


def test_a_side_whose_conventional_one_failed_meets_nothing():
    assert memory_targets(MEMORY[3:]) == []


def test_other_methods_stand_beside_plain_adamw(page_of):
    page = page_of(alternatives=ALTERNATIVES)
    assert cells_of(page, "tied, AdamW")[1:6] == ["7 of 48", "4,000", "3.00x", "9.00", "0.90"]
    assert cells_of(page, "LoRA, checkpointing")[2] == "no peft"


def test_parts_of_speed_that_failed_are_named(page_of):
    page = page_of(speed=SPEED)
    assert "- 12 x 768, 3 independent, `compile`: no compiler" in page
    assert cells_of(page, "12 x 768, 3 independent, sum")[4] == "3.500 (0.95)"
    assert "Compiled layers\n" not in page


def test_hardware_versions_and_command_are_said(page_of):
    page = page_of(memory=MEMORY)
    assert "`make bench-memory`: a processor (cpu, 2 threads); python 3.11, torch 2.13.0" in page
    assert "bench-speed" not in page


def test_the_page_and_its_picture_depend_on_the_results_alone(page_of, tmp_path):
    both = []
    for _ in range(2):
        both.append((page_of(memory=MEMORY), (tmp_path / "images/memory.png").read_bytes()))
    assert both[0] == both[1]


def test_without_results_the_page_says_how_to_get_them(page_of):
    assert "Nothing has been measured yet: `make bench-memory`" in page_of()


def test_the_page_in_the_documentation_is_of_the_committed_results():
    folder, docs = performance_page.BENCHMARKS / "results", performance_page.BENCHMARKS.parent
    results = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in performance_page.FILES
        if (folder / f"{name}.json").exists()
    }
    page = (docs / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page == performance_page.performance_page(results)
