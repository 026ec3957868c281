"""The page of results: every row is there, shares are right, and what is missing is said."""

import pytest

from layer_tying.paper.rows import recipes
from layer_tying.report.results import results_page

SUMMARY = {
    **{"seconds": {"train": 1800.0, "validate": 1800.0}, "test_perplexity": 200.0},
    **{"independent_layers_mean": 12.0, "independent_layers_end": 12},
    **{"trainable_parameters_mean": 2.5e6, "trainable_parameters_end": 2.5e6},
    **{"model_state_bytes_peak": 40e6, "seconds_per_step": 0.5, "accuracy": 0.625},
    **{"bits_per_byte": 2.125, "matthews_correlation": -0.125, "f1": 0.75},
}


def entry(row: str, **changes) -> dict:
    return {
        **{"row": row, "command": f"layer-tying recipe {row}", "seed": 0},
        "versions": {"torch": "2.13.0", "transformers": "5.0"},
        "hardware": {"processor": "a processor", "device": "cpu", "threads": 1},
        "summary": SUMMARY | changes,
    }


def page_of(*entries: dict, **not_run: str) -> str:
    return results_page({"scale": "small", "rows": list(entries), "not_run": not_run})


def cells_of(page: str, start: str) -> list[str]:
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")]
    (cells,) = [line for line in lines if line[0].strip() == start]
    return [cell.strip() for cell in cells]


def test_every_row_stands_in_a_table():
    page = page_of(*(entry(name) for name in recipes("small")))
    lines = [line for line in page.splitlines() if line.startswith("|") and "---" not in line]
    heads = 4
    # GLUE has a line a metric, and one for the layers, instead of one a row.
    other = [name for name in recipes("small") if not name.startswith("glue")]
    ablations_again = 2  # the WikiText-2 pair stands over its ablations too
    assert len(lines) == heads + len(other) + ablations_again + (5 + 5 + 2)
    assert "31 rows took 31.0 hours" in page


def test_what_is_worse_than_conventional_is_shown_so():
    page = page_of(
        entry("gpt2-wiki2-conventional"),
        entry("gpt2-wiki2-dynamic", test_perplexity=250.0, model_state_bytes_peak=10e6),
    )
    cells = cells_of(page, "WikiText-2, dynamic")
    assert cells[1:3] == ["250.00", "125%"]
    assert "25%" in cells
    assert "10.00 MB" in cells


def test_a_row_without_its_conventional_run_has_no_share():
    cells = cells_of(page_of(entry("gpt2-1b-dynamic")), "One Billion Words, dynamic")
    assert cells[2] == "-"


def test_glue_stands_by_task_and_tying():
    page = page_of(
        entry("glue-cola-keep"),
        entry("glue-cola-none", accuracy=0.5, matthews_correlation=None),
    )
    assert cells_of(page, "cola, accuracy") == ["cola, accuracy", "0.625", "-", "0.500"]
    assert cells_of(page, "cola, Matthews correlation") == [
        "cola, Matthews correlation",
        "-0.125",
        "-",
        "-",
    ]
    assert "rte" not in page


def test_what_could_not_be_run_says_why():
    page = page_of(**{"gpt2-wiki103-dynamic": "no local files"})
    assert "No row has been run yet" in page
    assert "- `gpt2-wiki103-dynamic`: no local files" in page


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_not_a_number_is_a_dash(value):
    page = page_of(entry("gpt2-wiki2-conventional", bits_per_byte=value))
    assert cells_of(page, "WikiText-2, conventional")[4] == "-"
