"""Figures as the paper gives them; what is not here is not known.

GPT-2 with 48 layers of width 1,600 on WikiText-2, from David-Hay and Wolf, *Dynamic Layer Tying for
Parameter-Efficient Transformers*, ICLR 2024. Keys are those of ``summary.json``.
"""

from __future__ import annotations

GPT2_WIKITEXT2: dict[str, dict[str, float]] = {
    "conventional": {"test_perplexity": 53.57, "peak_memory_bytes": 12_566.66e6},
    "dynamic": {"test_perplexity": 49.37, "peak_memory_bytes": 4_514.31e6},
}
