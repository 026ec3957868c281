"""The page of results: every row is there, shares are right, and what is missing is said."""

import pytest

from layer_tying.paper.rows import recipes
from layer_tying.report.results import results_page

SUMMARY = {
    **{"seconds": {"train": 1800.0, "validate": 1800.0}, "test_perplexity": 200.0},
    **{"independent_layers_mean": 12.0, "independent_layers_end": 12},
    **{"trainable_parameters_mean": 2.5e6, "trainable_parameters_end": 2.5e6},
    **{"model_state_bytes_mean": 30e6, "model_state_bytes_peak": 40e6, "accuracy": 0.625},
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


def gated(*entries: dict) -> str:
    """The page of rows, with those that pass the gate of WikiText-2."""
    names = [entry["row"] for entry in entries]
    sides = {"conventional": 200.0, "shallow": 220.0, "dynamic": 300.0}
    passing = [entry(f"gpt2-wiki2-{side}", test_perplexity=x) for side, x in sides.items()]
    return page_of(*(each for each in passing if each["row"] not in names), *entries)


def test_every_row_stands_in_a_table():
    learned = {"accuracy": 0.8, "masked_accuracy": 0.3}
    page = page_of(
        *(
            entry(name, **learned, test_perplexity=220.0 if "shallow" in name else 200.0)
            for name in recipes("small")
        )
    )
    lines = [line for line in page.splitlines() if line.startswith("|") and "---" not in line]
    heads = 4
    # GLUE has a line a metric, and one for the layers, instead of one a row.
    other = [name for name in recipes("small") if not name.startswith("glue")]
    assert len(lines) == heads + len(other) + (5 + 5 + 2)
    assert "45 runs took 45.0 hours" in page
    assert "Omitted" not in page


def test_what_is_worse_than_conventional_is_shown_so():
    page = gated(
        entry("gpt2-wiki2-dynamic", test_perplexity=250.0, model_state_bytes_peak=10e6),
    )
    cells = cells_of(page, "the paper's agent")
    assert cells[1:3] == ["250.000", "125.0%"]
    assert "25.0%" in cells and "10.00 MB" in cells
    opening = page.partition("Omitted")[0]
    assert "full model has 9.1% lower perplexity than one with a quarter of its layers" in opening
    assert "1.250 times the perplexity of conventional" in opening
    assert (
        "a quarter of the layers has 1.100 times the conventional perplexity, with 100% of"
        in opening
    )
    assert "take 100% of the conventional memory on average and 25% at the peak" in opening
    assert "49.37 with its agent and 53.57 without" in page
    assert "0.922 times the conventional one, against 1.250 at this scale" in page


def test_what_has_not_learned_is_not_shown_and_says_why():
    page = page_of(
        entry("gpt2-wiki2-conventional", test_perplexity=200.0),
        entry("gpt2-wiki2-shallow", test_perplexity=204.0),
        entry("gpt2-1b-dynamic"),
        entry("gpt2-lambada-conventional"),
        entry("vit-cifar10-conventional", accuracy=0.5),
        entry("bert-wiki2-conventional"),
        entry("glue-sst2-none", accuracy=0.7799),
        entry("glue-mrpc-none"),
    )
    for reason in (
        "GPT-2 on WikiText-2: the full model has 2.0% lower perplexity than one with a quarter of "
        "its layers, and the gate is 5%.",
        "GPT-2 on One Billion Words: the conventional row was not run.",
        "GPT-2 on LAMBADA: no conventional model of a quarter of the layers was run.",
        "ViT on CIFAR-10: conventional training reached accuracy 0.500, and the gate is 0.62.",
        "BERT on masked tokens of WikiText-2: the conventional row has no masked_accuracy.",
        "SST-2: conventional training reached accuracy 0.780, and the gate is 0.78.",
    ):
        assert f"- {reason}" in page
    assert "mrpc, accuracy" in page and "sst2, accuracy" not in page
    assert "200.000" not in page


def test_seeds_are_averaged_with_their_deviation():
    page = gated(
        entry("gpt2-wiki2-mixture", test_perplexity=210.0),
        entry("gpt2-wiki2-mixture", test_perplexity=214.0, independent_layers_end=3) | {"seed": 1},
    )
    cells = cells_of(page, "learned mixtures, uses scaled by 1/n")
    assert cells[1:3] == ["212.000 ± 2.828", "105.0%"]  # the conventional row has seed 0 only
    assert cells[-1] == "2" and "Seeds: 0, 1" in page


def test_a_row_of_one_seed_is_compared_with_the_conventional_run_of_that_seed():
    page = gated(
        entry("gpt2-wiki2-conventional", test_perplexity=200.0),
        entry("gpt2-wiki2-conventional", test_perplexity=100.0) | {"seed": 1},
        entry("gpt2-wiki2-mixture", test_perplexity=110.0) | {"seed": 1},
    )
    cells = cells_of(page, "learned mixtures, uses scaled by 1/n")
    assert cells[1:3] == ["110.000", "110.0%"]  # and not 73 % of the mean
    assert "; learned mixtures of a quarter of the layers 1.100." in page


def test_rows_without_a_seed_in_common_are_not_compared():
    page = gated(entry("gpt2-wiki2-mixture", test_perplexity=110.0) | {"seed": 2})
    cells = cells_of(page, "learned mixtures, uses scaled by 1/n")
    assert cells[1:3] == ["110.000", "-"]
    assert "learned mixtures of a quarter" not in page


def test_depth_is_judged_by_the_seeds_of_both_sides():
    page = page_of(
        entry("gpt2-wiki2-conventional", test_perplexity=200.0),
        entry("gpt2-wiki2-conventional", test_perplexity=180.0) | {"seed": 1},
        entry("gpt2-wiki2-shallow", test_perplexity=204.0),
    )
    assert "GPT-2 on WikiText-2: the full model has 2.0% lower perplexity" in page


@pytest.mark.parametrize("row", ["conventional", "shallow", "dynamic", "mixture"])
@pytest.mark.parametrize("diverged", [0, 1])
def test_a_seed_that_diverged_is_not_left_out_of_a_mean(row, diverged):
    name = f"gpt2-wiki2-{row}"
    page = gated(
        *(
            entry(name, test_perplexity=None if seed == diverged else 210.0) | {"seed": seed}
            for seed in (0, 1)
        )
    )
    assert "210.000" not in page
    if row == "mixture":
        assert cells_of(page, "learned mixtures, uses scaled by 1/n")[1] == "-"


def test_glue_that_diverged_is_shown_as_unknown():
    page = page_of(entry("glue-cola-none", accuracy=None, data={"majority_share": 0.691}))
    assert cells_of(page, "cola, accuracy")[3] == "-"


def test_glue_stands_by_task_and_tying():
    page = page_of(
        entry("glue-cola-keep", data={"majority_share": 0.691}),
        entry("glue-cola-none", accuracy=0.5, matthews_correlation=None),
    )
    assert cells_of(page, "cola, accuracy") == ["cola, accuracy", "0.625", "-", "0.500", "0.691"]
    assert cells_of(page, "cola, Matthews correlation") == [
        *("cola, Matthews correlation", "-0.125", "-", "-", "-"),
    ]
    assert "rte" not in page


def test_what_could_not_be_run_says_why():
    page = page_of(**{"gpt2-wiki103-dynamic": "no local files"})
    assert "No row has been run yet" in page
    assert "- `gpt2-wiki103-dynamic`: no local files" in page


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_what_is_not_a_number_is_a_dash(value):
    page = gated(entry("gpt2-wiki2-conventional", bits_per_byte=value))
    assert cells_of(page, "conventional")[4] == "-"


def test_the_gates_that_were_passed_are_said_and_what_they_do_not_show():
    learned = {"masked_accuracy": 0.3}
    page = page_of(
        entry("bert-wiki2-conventional", **learned, test_perplexity=200.0),
        entry("bert-wiki2-shallow", **learned, test_perplexity=202.0),
    )
    assert (
        "masked accuracy 0.300 (gate: 0.25), but the full model has 1.0% lower perplexity" in page
    )


def test_the_opening_says_what_sharing_costs_in_bert_where_it_was_run():
    learned = {"masked_accuracy": 0.6}
    sides = {"conventional": 200.0, "shallow": 240.0, "dynamic": 250.0, "mixture": 210.0}
    rows = [entry(f"bert-wiki2-{s}", **learned, test_perplexity=x) for s, x in sides.items()]
    page = gated(*rows)
    assert (
        "BERT, masked tokens of WikiText-2: the agent has 1.250 times the conventional "
        "perplexity, a quarter of the layers 1.200, learned mixtures 1.050."
    ) in page.partition("Included, because")[0]
    assert "(gate: 0.25), and the full model has 16.7% lower perplexity than" in page
    assert cells_of(page, "BERT, masked tokens of WikiText-2, learned mixtures, uses scaled by 1/n")
    assert "ViT, CIFAR-10: the agent" not in page


def test_tasks_whose_model_hardly_beats_the_majority_class_are_named():
    majority = {"data": {"majority_share": 0.6}}
    page = page_of(
        entry("glue-rte-none", accuracy=0.59, **majority),
        entry("glue-mrpc-none", accuracy=0.64, **majority),
        entry("glue-cola-none", accuracy=0.66, **majority),
        entry("glue-qnli-none", accuracy=0.60, **majority),
    )
    assert "On qnli, mrpc and rte the conventional model is less than 5 points better than" in page
