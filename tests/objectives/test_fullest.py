"""The batch of the trial step takes what text of the same size takes."""

from types import SimpleNamespace

import pytest

from megatron_mixcpt.objectives.dpo import DPOTask
from megatron_mixcpt.objectives.packed_text import PackedTextTask


@pytest.mark.parametrize("task", [PackedTextTask, DPOTask])
def test_it_has_tokens_of_all_kinds_so_that_experts_share_them(task):
    mix = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=5))
    batch = task.fullest_batch(SimpleNamespace(_mix=mix, row_length=16), 2)
    assert sorted(set(batch.tokens.flatten().tolist())) == [0, 1, 2, 3, 4]
    assert batch.tokens.shape == (2, 16)
