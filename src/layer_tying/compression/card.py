"""The card of a compressed model: the README.md of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layer_tying.files import write_text_whole

CARD = """---
library_name: layer-tying
base_model: {name}
tags:
- layer-tying
- compressed
---
# {name}, compressed to {independent} of {layers} layers

The {layers} layers of `{name}` {share} {independent} sets of weights. The groups were chosen by how
far sharing moves the output of the untouched model on {data}; then the model was trained for
{steps:,} steps to give that output again. It has {after:,} parameters of {before:,}
({percent:.0%}); its weights take {megabytes:.2f} MB.

| {data} | {heads} |
| :--- | {rules} |
| untouched, test | {untouched} |
| compressed, test | {compressed} |

Layers by the layer whose weights they started from: {reading}.

It computes as many layers as before: what it saves is memory and storage, not time.

## How to use it

```python
from layer_tying import load

model = load("THIS_FOLDER")  # a {kind} of transformers, its layers sharing weights
```

`layer-tying export THIS_FOLDER --format expanded --output PLAIN` writes a plain folder that
`from_pretrained` loads without this library. `report.html` shows what was measured.

Versions: {versions}.
"""
SHARES = {"mixture": "read learned mixtures of", "tied": "use"}
SHOWN = ("perplexity", "accuracy", "bits_per_byte")


def write_card(output: Path, summary: Mapping[str, Any]) -> None:
    """Write the card of a model from the summary of its compression."""
    before, after = (summary[when]["test"] for when in ("before", "after"))
    names = [name for name in SHOWN if name in before]
    card = CARD.format(
        name=Path(summary["source"]).resolve().name,
        independent=summary["independent_layers"],
        layers=summary["num_layers"],
        share=SHARES[summary["sharing"]],
        data=f"`{Path(summary['dataset']).name}`",
        steps=summary["steps"],
        before=summary["parameters_before"],
        after=summary["parameters_after"],
        percent=summary["parameters_after"] / summary["parameters_before"],
        megabytes=summary["bytes_after"] / 1e6,
        heads=" | ".join(name.replace("_", " ") for name in names),
        rules=" | ".join("---:" for _ in names),
        untouched=_row(before, names),
        compressed=_row(after, names),
        reading=" ".join(map(str, summary["reading"])),
        kind=summary["model"],
        versions=", ".join(f"{name} {each}" for name, each in summary["versions"].items()),
    )
    write_text_whole(output / "README.md", card)


def _row(scores: Mapping[str, float], names: Sequence[str]) -> str:
    return " | ".join(f"{scores[name]:.4g}" for name in names)
