"""The loss as PyTorch users write it today: what the fused one is measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swapped(teacher: Tensor, labels: Tensor) -> Tensor:
    """Teacher logits `[N, V]` with those of the argmax and of the label exchanged."""
    argmax, label = teacher.argmax(-1, keepdim=True), labels.unsqueeze(-1)
    top, gold = teacher.gather(-1, argmax), teacher.gather(-1, label)
    return teacher.scatter(-1, argmax, gold).scatter(-1, label, top)


def eager_lssd_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy plus KL to the swapped teacher, `[N]`, from logits `[N, V]` without ignored labels."""
    log_p = torch.log_softmax(swapped(teacher, labels).float() / temperature, -1)
    log_q = torch.log_softmax(student.float() / temperature, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return F.cross_entropy(student.float(), labels, reduction="none") + kl
