"""`layer-tying train` with low-rank matrices: a rival of sharing that has as many parameters.

The layers are independent, and each of their matrices is a product of two thin ones.

    python benchmarks/low_rank.py 0.25 --config run.json    # with a quarter of the parameters
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import nn

from layer_tying.cli import command
from layer_tying.core.find import find_layers
from layer_tying.core.tying import Tying
from layer_tying.runs import train
from layer_tying.runs.trainer import Trainer


def cut_ranks(layers: Iterable[nn.Module], share: float) -> None:
    """Replace every linear map by two thin ones that have a share of its parameters.

    They are U sqrt(S) and sqrt(S) V' of its truncated singular value decomposition, for new weights
    as well (spectral initialization, Khodak et al. 2021).
    """
    for layer in layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                rank = max(1, int(share * rows * columns / (rows + columns)))
                parent, attribute = name.rpartition(".")[::2]
                setattr(layer.get_submodule(parent), attribute, _factors(module, rank))


def _factors(module: nn.Linear, rank: int) -> nn.Sequential:
    left, values, right = torch.linalg.svd(module.weight.detach(), full_matrices=False)
    root = values[:rank].sqrt()
    inner = nn.Linear(module.in_features, rank, bias=False)
    outer = nn.Linear(rank, module.out_features, bias=module.bias is not None)
    with torch.no_grad():
        inner.weight.copy_(root[:, None] * right[:rank])
        outer.weight.copy_(left[:, :rank] * root)
        if module.bias is not None:
            outer.bias.copy_(module.bias)
    return nn.Sequential(inner, outer)


def main(share: float, *flags: str) -> int:
    """Train a run; returns the exit code."""

    class LowRankTrainer(Trainer):
        def _build_model(self, start: Tying) -> None:
            super()._build_model(start)
            cut_ranks(find_layers(self.model).blocks, share)

    train.Trainer = LowRankTrainer
    return command.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
