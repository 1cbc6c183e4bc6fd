"""Logits that a loss is tried on."""

import torch

from megatron_mixcpt.kernels import lssd_loss


def problem(shape, vocab, device, dtype=torch.float32, seed=0, scale=3.0, ignore=True):
    """Random logits whose teacher agrees with the label on some tokens, and an upstream gradient of every sign."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(*shape, vocab, generator=generator) * scale
    teacher = torch.randn(*shape, vocab, generator=generator) * scale
    labels = torch.randint(0, vocab, shape, generator=generator)
    agree = torch.rand(shape, generator=generator) < 0.3
    labels = torch.where(agree, teacher.to(dtype).argmax(-1), labels)
    if ignore:
        labels = labels.masked_fill(torch.rand(shape, generator=generator) < 0.2, -100)
    upstream = torch.randn(shape, generator=generator)
    upstream[torch.rand(shape, generator=generator) < 0.1] = 0
    return student.to(device, dtype), teacher.to(device, dtype), labels.to(device), upstream.to(device)


def with_details(*args, **options):
    return lssd_loss(*args, return_details=True, **options)
