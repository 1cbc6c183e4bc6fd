"""What every implementation of the loss shares: the constants of one call and the per-token words it keeps.

A shard reduces its columns of one token to a few fp32 words (`stats`). The words of all shards give the loss and a
record (`combine`), and the record is all that the gradient needs beside the logits (`gradient`).
With x = (T - M_T) / tau over the columns of the shard, words in a column of the statistics buffer `[words, N]` are:

    M_S  max S            L_S  sum e^((S - M_S) / tau)     S_Y  S at the label, NaN where the label is another shard's
    M_T  max T            L_T  sum e^x                     T_Y  T at the label, likewise
    ARG  global id of the (first) maximum of T             S_A  S at that column
    CROSS  sum e^x ((T - M_T) - (S - M_S))

and where tau != 1, the same at temperature 1: of the student for cross-entropy (L_1), of both for the divergence from
the base model (L_T1, CROSS_1), which is always taken at temperature 1:

    L_1  sum e^(S - M_S)          L_T1  sum e^(T - M_T)     CROSS_1  sum e^(T - M_T) ((T - M_T) - (S - M_S))

The record is written over the words. M_*, L_* and ARG then hold the values over all shards, and three words describe
the target: p' = KEEP * p everywhere but at the argmax (NEW_A) and at the label (NEW_Y, which wins where both are one).
"""

from dataclasses import dataclass

from torch import Tensor

M_S, L_S, S_Y, M_T, L_T, T_Y, ARG, S_A, CROSS, L_1, L_T1, CROSS_1 = range(12)
KEEP, NEW_A, NEW_Y = T_Y, S_A, CROSS  # in the record
TARGETS = ("swap", "plain", "mft")
MAX_VOCAB = 2**24  # ids travel as fp32, which holds every integer up to here


@dataclass(frozen=True)
class LossConstants:
    """Constants of one call; `N` is the number of tokens, ids are global."""

    has_teacher: bool
    target: str
    temperature: float
    margin: float
    ce_weight: float | Tensor  # or fp32 [N]
    kd_weight: float | Tensor  # or fp32 [N]
    vocab_start: int  # global id of the shard's first column
    valid: int  # columns of the shard that are vocabulary, the rest is padding
    ignore_index: int

    @property
    def separate_ce(self) -> bool:
        """Whether what is always taken at temperature 1, cross-entropy and KL(p || q), needs sums of its own."""
        return self.temperature != 1.0

    @property
    def num_words(self) -> int:
        if self.separate_ce:
            return CROSS_1 + 1 if self.has_teacher else L_1 + 1
        return CROSS + 1 if self.has_teacher else S_Y + 1
