"""Which weights to keep, given a score of each: exact counts, and a rule for ties so that a rerun never differs."""

from __future__ import annotations

import torch
from torch import Tensor


def keep_top(score: Tensor, drop: int) -> Tensor:
    """Bool mask over the last dimension: exactly ``drop`` lowest scores are False; of equal scores the first go first.

    The same entries as a stable ascending sort would drop, at the cost of one k-th value.
    """
    if drop <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    limit = score.kthvalue(drop, dim=-1, keepdim=True).values
    keep = score > limit
    ties = score == limit
    spare = drop - (score < limit).sum(-1, keepdim=True)  # ties that still have to go
    if (ties.sum(-1, keepdim=True) != spare).any():
        keep |= ties & (ties.cumsum(-1) > spare)
    return keep


def keep_n_of_m(score_OI: Tensor, n: int, m: int) -> Tensor:
    """Bool mask [O, I]: the ``n`` highest scores of every ``m`` neighbours along the last dimension; of equal ones the first stay.

    That is what ``torch.topk`` on a CPU, and with it the official code, mostly does with ties, of which magnitudes have many.
    """
    groups = score_OI.reshape(-1, m)
    if m > 4:
        return keep_top(groups.flip(1), m - n).flip(1).view(score_OI.shape)
    # For short groups comparing every pair is several times cheaper than sorting.
    a = groups.unbind(1)
    beats = torch.zeros(m, groups.shape[0], dtype=torch.int8, device=score_OI.device)
    for i in range(m):
        for j in range(i + 1, m):
            won = a[i] >= a[j]
            beats[i] += won
            beats[j] += ~won
    return (beats >= m - n).T.reshape(score_OI.shape)
