"""`topk_lssd_loss`: the LSSD loss against a cached teacher that kept only its k best tokens and the label.

The explicit set E is the k tokens and the label; everything else is one bucket, on both sides:
KL = sum_E p' (ln p' - ln q) + p'_rest (ln p'_rest - ln q_rest). The gradient of an explicit column is q (sum p') - p',
of any other q (sum p' - p'_rest / q_rest): one factor a row for the dense sweep, and k + 1 columns written over it.
"""

import dataclasses

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_mixcpt.kernels.arguments import check_logits, make_constants
from megatron_mixcpt.kernels.backend import choose_backend
from megatron_mixcpt.kernels.collectives import Group, all_gather
from megatron_mixcpt.kernels.constants import L_1, L_S, M_S, S_Y, LossConstants
from megatron_mixcpt.kernels.layout import is_grid
from megatron_mixcpt.kernels.lssd import Loss, pack_outputs, shape_outputs
from megatron_mixcpt.kernels.reference import common_maximum, edited_target, finite, owned_value, weighted

TINY = 2.0**-24  # the rest of the student's mass is a difference of fp32 numbers: it is not resolved below this share


def topk_lssd_loss(
    student: Tensor,
    ids: Tensor,
    logp: Tensor,
    gold_logp: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    ce_weight: float | Tensor = 1.0,
    kd_weight: float | Tensor = 1.0,
    target: str = "swap",
    margin: float = 0.2,
    group: Group | None = None,
    vocab_start: int = 0,
    valid_vocab: int | None = None,
    ignore_index: int = -100,
    return_details: bool = False,
) -> Loss:
    """`lssd_loss` with a sparse teacher: ids `[..., k]` its most likely tokens (global, distinct), logp `[..., k]`
    their log-probabilities, gold_logp `[...]` the label's.

    Log-probabilities are of softmax(teacher / temperature) over the whole vocabulary, for the temperature given here.
    The label may be among the ids or not. All ranks of `group` pass the same ids and log-probabilities.
    With k + 1 covering the vocabulary this is `lssd_loss`; otherwise its KL is that between the coarser distributions,
    which is never more, and so is `kl_base`. That is taken at `temperature`: what the teacher gives at temperature 1 to
    the tokens that were not kept cannot be told from log-probabilities at another.

    The other arguments, the result and the errors are those of `lssd_loss`. Beyond the logits' gradient it takes a few
    dozen bytes a token and id.
    """
    check_logits("student", student, labels)
    for name, tensor, shape in (("logp", logp, ids.shape), ("gold_logp", gold_logp, labels.shape)):
        if tensor.shape != shape or not tensor.is_floating_point():
            raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} must be floating point {list(shape)}")
    if ids.shape[:-1] != labels.shape or ids.dtype not in (torch.int32, torch.int64) or ids.shape[-1] == 0:
        raise ValueError(f"ids {list(ids.shape)} {ids.dtype} must be int32 or int64 {[*labels.shape, 'k']}")
    constants = make_constants(
        labels,
        student.shape[-1],
        has_teacher=True,
        group=group,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        target=target,
        margin=margin,
        vocab_start=vocab_start,
        valid_vocab=valid_vocab,
        ignore_index=ignore_index,
    )
    outputs = _TopkLSSD.apply(
        student if is_grid(student) else student.contiguous(),
        ids.reshape(-1, ids.shape[-1]),
        logp.detach().reshape(-1, ids.shape[-1]).float(),
        gold_logp.detach().reshape(-1).float(),
        labels.reshape(-1).contiguous(),
        constants,
        group,
        return_details,
    )
    return shape_outputs(outputs, labels.shape, return_details)


class _TopkLSSD(torch.autograd.Function):
    """The dense sweeps are those of `lssd_loss` without a teacher; the explicit columns are worked on apart."""

    @staticmethod
    def forward(ctx, student, ids, logp, gold_logp, labels, constants, group, with_details):
        backend = choose_backend(student.device)
        dense = dataclasses.replace(constants, has_teacher=False)
        words = torch.empty(
            backend.num_splits(labels.numel()), dense.num_words, labels.numel(),
            device=student.device, dtype=torch.float32,
        )  # fmt: skip
        backend.stats(student, None, labels, dense, words)
        explicit = _Explicit(ids, logp, gold_logp, labels, constants)
        shards, sparse = _gather_both(words, explicit.words(student, words[:, M_S].amax(0)), group)
        record = words.new_empty(words.shape[1:])
        results = backend.combine(shards, record, labels, dense, True)
        kl, kl_base, rest_factor = explicit.divergence(sparse, record)
        kl = torch.where(owned_value(shards[:, S_Y]).isnan(), torch.nan, kl)  # no shard has the label
        ignored = labels == constants.ignore_index
        results["loss"] += weighted(kl, constants.kd_weight).masked_fill_(ignored, 0)
        ctx.save_for_backward(student, labels, record, rest_factor, explicit.column, explicit.target, explicit.total)
        ctx.constants, ctx.dense, ctx.backend = constants, dense, backend
        if with_details:
            details = {"kl": kl, "kl_base": kl_base, "swapped": ~explicit.same}
            details |= {"p_argmax": explicit.p_argmax, "p_label": explicit.p_label}
            results |= {name: value.masked_fill(ignored, 0) for name, value in details.items()}
        return pack_outputs(ctx, results, with_details)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        student, labels, record, rest_factor, column, target, total = ctx.saved_tensors
        constants, tau = ctx.constants, ctx.constants.temperature
        upstream = upstream.reshape(-1).masked_fill(labels == constants.ignore_index, 0)
        dense = dataclasses.replace(ctx.dense, kd_weight=weighted(rest_factor, constants.kd_weight))
        grad = torch.empty_like(student)
        ctx.backend.gradient(student, None, labels, record, upstream, dense, grad)
        if grad.numel():
            shifted = _values(student, column) - record[M_S].unsqueeze(-1)
            q = (shifted / tau).exp() / record[L_S].unsqueeze(-1)
            q_1 = shifted.exp() / record[L_1].unsqueeze(-1) if constants.separate_ce else q
            is_label = column == (labels - constants.vocab_start).unsqueeze(-1)
            kd = _rows(constants.kd_weight) / tau * (q * total.unsqueeze(-1) - target)
            ce = _rows(constants.ce_weight) * (q_1 - is_label.float())
            value = upstream.unsqueeze(-1) * (_where_weighted(kd, constants.kd_weight) + ce)
            _overwrite(grad, column, value.masked_fill((upstream == 0).unsqueeze(-1), 0))
        return grad, None, None, None, None, None, None, None


class _Explicit:
    """The explicit set of each token, `[N, k + 1]`: its columns in this shard, the teacher's p and target p'."""

    def __init__(self, ids: Tensor, logp: Tensor, gold_logp: Tensor, labels: Tensor, constants: LossConstants):
        label = labels.unsqueeze(-1)
        repeated = (ids == label).any(-1, keepdim=True)  # the label is among the ids: its own column is not needed
        ids = torch.cat([ids.long(), label], -1)
        logp = torch.cat([logp, gold_logp.unsqueeze(-1).masked_fill(repeated, -torch.inf)], -1)
        is_label = ids == label
        used = torch.cat([torch.ones_like(ids[:, :-1], dtype=torch.bool), ~repeated], -1)
        top = logp.amax(-1, keepdim=True)
        argmax = torch.where(logp == top, ids, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
        self.p_argmax, self.p_label = top.squeeze(-1).exp(), gold_logp.exp()
        self.same = (argmax == label).squeeze(-1)
        keep, new_argmax, new_label = edited_target(self.p_argmax, self.p_label, self.same, constants)
        base = logp.exp()  # 0 where not used
        target = keep.unsqueeze(-1) * base
        target = torch.where(ids == argmax, new_argmax.unsqueeze(-1), target)
        target = torch.where(is_label, new_label.unsqueeze(-1), target)
        self.base, self.target = base, target.masked_fill(~used, 0)
        self.base_rest = (-torch.expm1(logp.logsumexp(-1))).clamp(min=0)
        self.rest = keep * self.base_rest
        self.total = self.target.sum(-1) + self.rest
        column = ids - constants.vocab_start
        self.column = column.masked_fill(~used | (column < 0) | (column >= constants.valid), -1)  # -1: not here
        self.tau = constants.temperature

    def words(self, student: Tensor, maximum: Tensor) -> Tensor:
        """This shard's part `[6, N]`, with x = (S - maximum) / tau: the student's maximum, sum e^x, then for the target
        sum p' x and sum p', and the same for the teacher's own probabilities p."""
        here = self.column >= 0
        x = (_values(student, self.column) - finite(maximum).unsqueeze(-1)) / self.tau
        words = [maximum, x.exp().masked_fill(~here, 0).sum(-1)]
        for mass in (self.target, self.base):
            cross = (mass * x).masked_fill(~here | (mass == 0), 0)
            words += [cross.sum(-1), mass.masked_fill(~here, 0).sum(-1)]
        return torch.stack(words)

    def divergence(self, shards: Tensor, record: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(KL(p' || q), KL(p || q), factor of q on the columns outside of the set) from all words `[tp, 6, N]`."""
        _, scale, moved = common_maximum(shards[:, 0])
        explicit = (shards[:, 1] * (scale / self.tau).exp()).sum(0)
        q_rest = (1 - explicit / record[L_S]).clamp(min=TINY)
        divergences = []
        for mass, rest, word in ((self.target, self.rest, 2), (self.base, self.base_rest, 4)):
            shares = shards[:, word + 1]
            cross = (shards[:, word] + shares * moved / self.tau).sum(0) - shares.sum(0) * record[L_S].log()
            tail = torch.where(rest > 0, rest * (rest.log() - q_rest.log()), 0.0)
            divergences.append(torch.xlogy(mass, mass).sum(-1) - cross + tail)
        kl, kl_base = divergences
        return kl, kl_base, self.total - self.rest / q_rest


def _gather_both(dense: Tensor, sparse: Tensor, group: Group | None) -> tuple[Tensor, Tensor]:
    """`[splits, words, N]` and `[6, N]` of every shard in one all-gather: `[tp * splits, words, N]`, `[tp, 6, N]`."""
    splits, words, num_tokens = dense.shape
    rows = splits * words + sparse.shape[0]
    gathered = all_gather(torch.cat([dense.view(-1, num_tokens), sparse]), group).view(-1, rows, num_tokens)
    return gathered[:, : splits * words].reshape(-1, words, num_tokens), gathered[:, splits * words :]


def _values(student: Tensor, column: Tensor) -> Tensor:
    """Logits at the columns `[N, k + 1]` in fp32; anything where the column is -1."""
    if student.shape[-1] == 0:
        return torch.zeros_like(column, dtype=torch.float32)
    index = column.clamp(min=0).view(*student.shape[:-1], column.shape[-1])
    return student.gather(-1, index).view(column.shape).float()


def _overwrite(grad: Tensor, column: Tensor, value: Tensor) -> None:
    """Write the values to their columns; those at -1 repeat the row's first write, or what stands in column 0.

    A scatter of fixed shape needs no wait for the device, unlike the selection of the columns that are here.
    """
    here = column >= 0
    first = here.byte().argmax(-1, keepdim=True)
    present = here.any(-1, keepdim=True)
    first_column = torch.where(present, column.gather(-1, first), 0)
    first_value = torch.where(present, value.gather(-1, first), grad[..., :1].reshape(-1, 1).float())
    shape = (*grad.shape[:-1], column.shape[-1])
    index = torch.where(here, column, first_column).view(shape)
    grad.scatter_(-1, index, torch.where(here, value, first_value).to(grad.dtype).view(shape))


def _rows(weight: float | Tensor) -> float | Tensor:
    return weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight


def _where_weighted(value: Tensor, weight: float | Tensor) -> Tensor:
    """The values, exactly 0 where their weight is 0."""
    if isinstance(weight, Tensor):
        return value.masked_fill((weight == 0).unsqueeze(-1), 0)
    return value if weight else torch.zeros_like(value)
