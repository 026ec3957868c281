"""The page of scaling: its model, its verdicts, and that the committed page is of its results."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scaling_page
from scaling_page import replicated_bytes, sharded_bytes, state_bytes, tokens_to_hide, write_page

ENVIRONMENT = {
    "versions": {"python": "3.11"},
    "hardware": {"processor": "a processor", "device": "cpu", "threads": 1},
}
SIZE = {"cores": 2, "layers": 12, "width": 256, "layer_parameters": 100, "rest_parameters": 50}
WAYS = {"ddp": 1.0, "ours": 1.0, "sharded": 2.0}
STEPS = {
    **{**SIZE, "part": "steps", "processes": 2, "independent": 3, "step_seconds": WAYS},
    **{"of_ddp": WAYS, "bytes": {"ddp": 3e6, "ours": 3e6, "sharded": 9e6}},
}
MEMORY = {
    **{**SIZE, "part": "memory", "processes": 4, "independent": 3, "step_seconds": 1.0},
    **{"built_bytes": 1e6, "held_bytes": 2e6, "peak_bytes": 3e6, "of_share": 1.01},
}


def page_of(folder: Path, *rows: dict) -> str:
    content = {"environment": ENVIRONMENT, "rows": rows}
    (folder / "scaling.json").write_text(json.dumps(content), encoding="utf-8")
    return write_page(folder).read_text(encoding="utf-8")


def test_bytes_and_memory_are_what_a_ring_and_adamw_need():
    assert replicated_bytes(3, 100, 50, 2) == 2 * 4 * 350  # of two, each sends all of it once
    assert sharded_bytes(12, 100, 50, 2) == 3 * 4 * 1250
    assert state_bytes(3, 100, 50, 4) == 4 * 4 * 350 / 4
    ratio = tokens_to_hide(48, 1e9) / tokens_to_hide(7, 1e9)
    layer, rest = scaling_page.SHAPE["layer"], scaling_page.SHAPE["rest"]
    assert ratio == pytest.approx((48 * layer + rest) / (7 * layer + rest))


def test_what_misses_its_aim_stands_at_the_top(tmp_path):
    fine = page_of(tmp_path, STEPS, MEMORY).partition("Written by")[0]
    assert "12 x 256" not in fine and "48 x 1600 was not measured" in fine
    slow = STEPS | {"of_ddp": WAYS | {"ours": 1.2}}
    full = MEMORY | {"of_share": 1.07, "built_bytes": 3e6}
    top = page_of(tmp_path, slow, full, {"part": "steps", "error": "none"}).partition("Written")[0]
    assert "2 processes: a step takes 1.20 of" in top
    assert "holds 1.070 of its share" in top
    assert "takes 3 MB where it trains with 2" in top


def test_the_page_in_the_documentation_is_of_the_committed_results():
    file = scaling_page.BENCHMARKS / "results" / "scaling.json"
    page = scaling_page.BENCHMARKS.parent / "docs" / "scaling.md"
    results = json.loads(file.read_text(encoding="utf-8"))
    assert page.read_text(encoding="utf-8") == scaling_page.scaling_page(results)
