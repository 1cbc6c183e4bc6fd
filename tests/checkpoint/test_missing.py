"""What rank 0 alone finds out, every rank is told."""

from pathlib import Path

import pytest

from megatron_mixcpt.checkpoint.start import load_model_weights
from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.spawn import run_distributed


def load_nothing(rank, world_size, path):
    with parallel_context():
        with pytest.raises(ConfigError) as raised:
            load_model_weights(None, Path(path))
    return str(raised.value)


@pytest.mark.distributed
def test_a_missing_checkpoint_is_told_on_all_ranks(tmp_path):
    told = run_distributed(load_nothing, 2, str(tmp_path / "nothing"), timeout=240)
    assert told[0].startswith(f"{tmp_path / 'nothing'}: no such directory; `mixcpt train`") and told[1] == told[0]
