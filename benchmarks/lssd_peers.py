"""The losses of other libraries that stand beside ours in the GPU benchmark, each where it is installed.

None of them swaps, and most do less than `lssd_loss`: `work` says what is computed. All are called as
`loss(student, teacher, labels)` on `[N, V]` logits, or on hidden states and heads, and give `[N]` or one number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.lssd_eager import eager_lssd_loss
from megatron_mixcpt.kernels import lssd_loss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One loss in the benchmark; `make(temperature)` imports it, with an ImportError where it is not installed."""

    name: str
    work: str
    make: Callable[[float], Loss]
    masks: bool = False  # takes ignored labels
    any_temperature: bool = False


def _ours(temperature: float) -> Loss:
    return lambda s, t, y: lssd_loss(s, t, y, temperature=temperature)


def _ours_ce(temperature: float) -> Loss:
    return lambda s, t, y: lssd_loss(s, None, y)


def _eager(temperature: float) -> Loss:
    return lambda s, t, y: eager_lssd_loss(s, t, y, temperature)


def _compiled(temperature: float) -> Loss:
    compiled = torch.compile(eager_lssd_loss, dynamic=False)
    return lambda s, t, y: compiled(s, t, y, temperature)


def _liger_kl(temperature: float) -> Loss:
    from liger_kernel.transformers import LigerKLDIVLoss

    kl = LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda s, t, y: kl(torch.log_softmax(s / temperature, -1), torch.log_softmax(t / temperature, -1))


def _liger_ce_tvd(temperature: float) -> Loss:
    from liger_kernel.transformers.fused_ce_tvd import LigerFusedCETVDLoss

    both = LigerFusedCETVDLoss()
    return lambda s, t, y: sum(both(s, t, y))


def _speculators(temperature: float) -> Loss:
    from speculators.losses.fused import fused_kl_div_loss

    return lambda s, t, y: fused_kl_div_loss(s.unsqueeze(0), t.unsqueeze(0)).squeeze(0)


def _modelopt(temperature: float) -> Loss:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    kl = LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1), temperature=temperature)
    return lambda s, t, y: kl(s.unsqueeze(1), t.unsqueeze(1))[0].flatten()


def _quack(temperature: float) -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda s, t, y: cross_entropy(s, y)


def _flash_attention(temperature: float) -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return lambda s, t, y: cross_entropy_loss(s, y)[0]


LOGITS = [
    Contender("ours", "swap + KL + CE", _ours, masks=True, any_temperature=True),
    Contender("eager", "swap + KL + CE", _eager, any_temperature=True),
    Contender("torch.compile", "swap + KL + CE", _compiled, any_temperature=True),
    Contender("Liger KL", "log_softmax twice, KL", _liger_kl, any_temperature=True),
    Contender("Liger CE+TVD", "CE + total variation", _liger_ce_tvd),
    Contender("speculators KL", "KL", _speculators),
    Contender(
        "Model-Optimizer", "KL", _modelopt, any_temperature=True
    ),
    Contender("ours, CE only", "CE", _ours_ce, masks=True),
    Contender("quack CE", "CE", _quack),
    Contender("flash-attention CE", "CE", _flash_attention),
]  # fmt: skip


def linear_contenders() -> dict[str, Callable[..., Tensor]]:
    """name -> loss(hidden, head, teacher_hidden, teacher_head, labels) of whatever is installed."""
    from megatron_mixcpt.kernels import linear_lssd_loss

    found: dict[str, Callable[..., Tensor]] = {
        "ours": linear_lssd_loss,
        "two products, then ours": lambda x, w, tx, tw, y: lssd_loss(x @ w.t(), tx @ tw.t(), y),
    }
    try:
        from fla.modules.fused_kl_div import fused_kl_div_loss

        found["fla KL"] = lambda x, w, tx, tw, y: fused_kl_div_loss(x, tx, w, tw)
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD

        divergence = LigerFusedLinearJSD(jsd_beta=0.0)
        found["Liger linear JSD, beta 0"] = lambda x, w, tx, tw, y: divergence(x, w, tx, tw, y)
    except ImportError:
        pass
    return found
