"""What is counted of the published code, on models made by hand; and that its page is right."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import published_page
from published import Blocks, Run, _state_bytes, train_ours, train_untied

CASE = {"layers": 3, "width": 8, "batch": 2, "length": 4, "lr": 1e-3, "episodes": 2, "seed": 0}


class Tiny(nn.Module):
    """Of the published model what is counted: a list of blocks, logits and a loss."""

    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({"h": nn.ModuleList(nn.Linear(8, 8) for _ in range(3))})
        self.embedding, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.transformer["h"]:
            hidden = hidden + block(hidden).tanh()
        return self.head(hidden), None


def run():
    text = "a text of some bytes. " * 20
    return Run(CASE, Tiny(), Blocks(text, 4), Blocks(text, 4))


def row(side, seed, claimed, storages, **more):
    measured = {"test_perplexity": 4.0, "state_bytes_mean": 1e6, "state_bytes_peak": 2e6}
    measured |= {"peak_resident_bytes": 3e6, "processor_seconds": 9.0, "published_commit": "abc"}
    measured |= {"claimed": claimed, "storages": storages, "validation_perplexities": [9.0, 5.0]}
    return {**CASE, "side": side, "heads": 2, **measured, "seed": seed, **more}


def test_a_block_is_followed_by_its_next_bytes():
    block = Blocks("abcdefghij", 4)[1]
    assert bytes(block["input_ids"].tolist()) == b"efgh"
    assert bytes(block["labels"].tolist()) == b"fghi"
    assert len(Blocks("abcdefgh", 4)) == 1, "the last block has no next byte"


def test_layers_that_point_at_one_storage_are_counted_once_their_gradients_apart():
    mine = run()
    blocks = mine.model.transformer["h"]
    apart = _state_bytes(mine.model, None)
    blocks[1].weight.data, blocks[1].bias.data = blocks[0].weight.data, blocks[0].bias.data
    mine.note_decision(3)
    assert (mine.claimed, mine.storages) == ([3], [2])
    assert apart - mine.state_bytes[0] == 4 * (64 + 8)
    blocks[1].requires_grad_(False)
    assert mine.state_bytes[0] - _state_bytes(mine.model, None) == 4 * (64 + 8)
    optimizer = torch.optim.SGD(mine.model.parameters(), lr=0.1)
    optimizer.state[blocks[0].bias] = {"momentum": torch.zeros(8), "step": 1}
    with_momentum = _state_bytes(mine.model, optimizer)
    assert with_momentum - _state_bytes(mine.model, None) == 4 * 8


def test_what_is_claimed_here_is_what_is_stored():
    mine = run()
    train_ours(mine)
    assert len(mine.claimed) == 4  # two episodes of eight steps, every four
    assert mine.claimed == mine.storages
    assert len(mine.perplexities) == 2 and mine.perplexities[1] < mine.perplexities[0]


def test_without_tying_every_layer_is_its_own():
    mine = run()
    train_untied(mine)
    assert (mine.claimed, mine.storages) == ([3], [3])
    assert mine.perplexities[1] < mine.perplexities[0]


def test_the_page_says_when_the_layers_collapsed_and_compares_whole_seeds(tmp_path):
    rows = [
        row("published", 0, [2, 2, 3, 2], [3, 2, 1, 1], test_perplexity=6.0),
        row("layer-tying", 0, [2, 1, 2, 2], [2, 1, 2, 2]),
        row("untied", 0, [3], [3], test_perplexity=3.0),
        row("published", 1, [2, 2, 2, 2], [3, 2, 2, 1], test_perplexity=99.0),
        {"side": "layer-tying", "seed": 1, "error": "none"},
    ]
    (tmp_path / "published.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    page = published_page.write_page(tmp_path).read_text(encoding="utf-8")
    assert "From decision 3 of 4 on" in page and "claims 2.5 independent" in page
    assert "1.500 times the test perplexity" in page and "0.750 times that of" in page
    assert (tmp_path / "images" / "published.png").stat().st_size > 10_000


@pytest.mark.parametrize(("storages", "decision"), [([1, 1], 1), ([3, 1], 2), ([2, 2], 3)])
def test_the_layers_have_collapsed_at_the_first_decision_without_another_storage(
    storages, decision
):
    assert published_page._collapsed_at({"storages": storages}) == decision


def test_the_committed_page_is_of_the_committed_results():
    rows = json.loads((published_page.RESULTS / "published.json").read_text())["rows"]
    groups = {s: [r for r in rows if r["side"] == s] for s in published_page.SIDES}
    page = published_page.RESULTS.parent.parent / "docs" / "published.md"
    assert page.read_text(encoding="utf-8") == published_page.published_page(groups)
