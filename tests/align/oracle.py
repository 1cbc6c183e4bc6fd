"""The preference losses as one writes them down, in Python numbers."""

import torch


def plain(policy, reference, lengths, *, loss="sigmoid", beta=0.1, label_smoothing=0.0, length_normalized=False):
    """One pair of Python numbers at a time."""
    losses = []
    for (pc, pr), (rc, rr), (nc, nr) in zip(policy, reference, lengths):
        a, b = (pc - rc) / (nc if length_normalized else 1), (pr - rr) / (nr if length_normalized else 1)
        if loss == "ipo":
            losses.append((a - b - 0.5 / beta) ** 2)
        else:
            x = beta * (a - b)
            win, lose = 1 / (1 + torch.exp(-x)), 1 / (1 + torch.exp(x))
            losses.append(-(1 - label_smoothing) * torch.log(win) - label_smoothing * torch.log(lose))
    return torch.stack(losses)
