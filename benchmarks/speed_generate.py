"""Parts of speed.py: a tied model loaded compactly, and the same one expanded."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from common import (
    DEVICE,
    VOCABULARY,
    Case,
    gpt2,
    held_bytes,
    in_a_process,
    peak_of_phase,
    random_tying,
)
from transformers import AutoModelForCausalLM, GenerationMixin

from layer_tying.saving.export import COMPACT, export_compact, export_expanded
from layer_tying.saving.load import load

PROMPT, NEW = 16, 32  # tokens
FORMATS = ("compact", "expanded")


def write_export(case: Case) -> Case:
    """Export a randomly initialised tied model in a format, to a folder."""
    torch.manual_seed(0)
    tying = random_tying(case["layers"], case["independent"], seed=0)
    model = gpt2(case["layers"], case["width"], case["heads"], case["length"], tying)
    model.config.use_cache = True
    export = export_compact if case["format"] == "compact" else export_expanded
    export(model, case["folder"])
    weights = Path(case["folder"]).glob("*.safetensors")
    return {"file_bytes": sum(file.stat().st_size for file in weights)}


def opened(folder: Path) -> GenerationMixin:
    """The model of a folder, on the device, as a user would load it."""
    if (folder / COMPACT).exists():
        model = load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(DEVICE).eval()  # type: ignore[return-value]


def generate(model: GenerationMixin) -> float:
    """Greedy, one sequence, with a KV cache: new tokens a second."""
    rng = torch.Generator().manual_seed(0)
    prompt = torch.randint(VOCABULARY, (1, PROMPT), generator=rng).to(DEVICE)
    start = time.perf_counter()
    tokens = model.generate(  # type: ignore[operator]
        prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True
    )
    assert tokens.shape[1] == PROMPT + NEW
    return NEW / (time.perf_counter() - start)


def measure_generation(case: Case) -> Case:
    """Tokens a second of both formats, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for format in FORMATS:
            place = Path(folder) / format
            write_export({**case, "format": format, "folder": str(place)})
            models[format] = opened(place)
    rates: dict[str, list[float]] = {format: [] for format in FORMATS}
    for _ in range(case["repeats"]):
        for format, model in models.items():
            rates[format].append(generate(model))
    best = {format: max(each) for format, each in rates.items()}
    return {
        "tokens_per_second": best,
        "compact_of_expanded": best["compact"] / best["expanded"],
    }


def measure_loading(case: Case) -> Case:
    """Seconds and memory of loading one format; another process writes what is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        toy = {"layers": 2, "width": 64, "heads": 2, "independent": 1, "length": 64}
        write_export({**toy, "format": case["format"], "folder": f"{folder}/toy"})
        generate(opened(Path(folder, "toy")))  # loads libraries
        place = Path(folder) / "model"
        script = str(Path(__file__).with_name("speed.py"))
        written = in_a_process(script, {**case, "part": "export", "folder": str(place)})
        own = held_bytes()
        start = time.perf_counter()
        model = opened(place)
        seconds = time.perf_counter() - start
        generate(model)
        return {
            "file_bytes": written["file_bytes"],
            "load_seconds": seconds,
            "above_own_bytes": peak_of_phase() - own,
        }
