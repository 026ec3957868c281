"""Mixtures of a trained model's layers in closed form, by truncated singular value decomposition.

The matrices W[0], ..., W[L-1] that L layers have in one place are to be approximated by mixtures
of M sets, W[i] ~ sum over m of c[i, m] A[m]. Weighted by the inputs x that the matrices see, the
error is the sum over i of E |(W[i] - ...) x|^2, and with S = E[x x'], taken over the inputs of all
layers, it depends on the matrices through their Gram matrix alone:

    G[i, j] = tr(W[i] S W[j]')                        [L, L]
    c = the eigenvectors of G of the M largest eigenvalues,   A[m] = sum over j of c[j, m] W[j]

(Eckart and Young 1936). G is as small as L x L, whatever the size of the matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def best_mixtures(
    matrices: Sequence[Tensor], number: int, second_moment: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The best M sets, and the coefficients of each layer.

    Args:
        matrices: L of one shape [out, in].
        number: M.
        second_moment: S, [in, in]; the identity if None.

    Returns:
        [L, M] coefficients, whose columns have the length of a tying's, sqrt(L / M); and M sets.
    """
    weighted = [w if second_moment is None else w @ second_moment for w in matrices]
    gram = torch.stack([torch.stack([(a * b).sum() for b in matrices]) for a in weighted]).double()
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    vectors = vectors.flip(1)[:, :number].to(matrices[0].dtype)
    length = (len(matrices) / number) ** 0.5
    sets = [sum(vectors[j, m] * w for j, w in enumerate(matrices)) / length for m in range(number)]
    return vectors * length, sets
