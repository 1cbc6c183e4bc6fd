"""What every implementation of the loss shares: the constants of one call and the per-token words it keeps.

A shard reduces its columns of one token to a few fp32 words (`stats`). The words of all shards give the loss and a
record (`combine`), and the record is all that the gradient needs beside the logits (`gradient`).
With x = (T - M_T) / tau over the columns of the shard, words in a column of the statistics buffer `[words, N]` are:

    M_S  max S            L_S  sum e^((S - M_S) / tau)     S_Y  S at the label, NaN where the label is another shard's
    M_T  max T            L_T  sum e^x                     T_Y  T at the label, likewise
    ARG  global id of the (first) maximum of T             S_A  S at that column
    CROSS  sum e^x ((T - M_T) - (S - M_S))                 L_1  sum e^(S - M_S), kept apart from L_S only if tau != 1

The record is written over the words: M_*, L_* and ARG then hold the values over all shards, CROSS holds p_y.
"""

from dataclasses import dataclass

from torch import Tensor

M_S, L_S, S_Y, M_T, L_T, T_Y, ARG, S_A, CROSS, L_1 = range(10)
P_Y = CROSS  # in the record
TARGETS = ("swap", "plain", "mft")
MAX_VOCAB = 2**24  # ids travel as fp32, which holds every integer up to here


@dataclass(frozen=True)
class Objective:
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
        """Whether cross-entropy needs its own normaliser: it is always taken at temperature 1."""
        return self.has_teacher and self.temperature != 1.0

    @property
    def num_words(self) -> int:
        if not self.has_teacher:
            return S_Y + 1
        return L_1 + 1 if self.separate_ce else L_1

    @property
    def ce_word(self) -> int:
        return L_1 if self.separate_ce else L_S
