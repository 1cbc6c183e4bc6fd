"""The losses of preference pairs, on log-probabilities that are already there.

h = (log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected)).
DPO (arXiv 2305.18290, equation 7): -log sigmoid(beta h), with label smoothing e the mean of both labellings (1 - e, e)
(conservative DPO). IPO (arXiv 2310.12036, equation 17): (h - 1 / (2 beta))^2. Length-normalised (as in Tulu 3, arXiv
2411.15124): every log-probability is divided by its number of tokens first.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_mixcpt.config import AlignSettings


def preference_loss(
    policy: Tensor, reference: Tensor, num_tokens: Tensor, settings: AlignSettings
) -> tuple[Tensor, Tensor]:
    """Loss of each pair `[n]` and rewards `[n, 2]` = beta * log-ratio (detached), of chosen and rejected.

    policy, reference: `[n, 2]` sums of log-probabilities of the chosen and the rejected answer. num_tokens: `[n, 2]`.
    """
    ratios = policy - reference
    if settings.length_normalized:
        ratios = ratios / num_tokens
    h = ratios[:, 0] - ratios[:, 1]
    if settings.loss == "ipo":
        loss = (h - 1.0 / (2.0 * settings.beta)) ** 2
    else:
        smoothing = settings.label_smoothing
        loss = -(1.0 - smoothing) * F.logsigmoid(settings.beta * h) - smoothing * F.logsigmoid(-settings.beta * h)
    return loss, settings.beta * ratios.detach()
