"""What `mixcpt launch` refuses of a chain's stages is what the commands themselves refuse."""

import pytest
import yaml

from megatron_mixcpt.errors import ConfigError
from megatron_mixcpt.slurm.check import check_command


def config(folder, **changes):
    values = {
        "model": {"preset": "tiny"},
        "data": {"mix": str(folder / "later" / "mix.json")},
        "train": {"steps": 1},
        "run_dir": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return str(path)


def test_the_teachers_answers_can_be_cached_for_an_alignment(tmp_path):
    path = config(tmp_path, align={"method": "sft"}, loss={"target": "swap"})
    assert check_command(["cache-teacher", path], 1, []) == []
    assert check_command(["align", path], 1, []) == []


@pytest.mark.parametrize(
    "parallel, ranks, message",
    [
        ({"context": 2}, 3, "x parallel.context=2 needs a multiple of 2 processes, not 3"),
        ({"pipeline": 2, "interleave": 2}, 2, "parallel.interleave 2 needs a number of micro-batches"),
    ],
)
def test_rows_and_stages_that_cannot_be_shared_out_are_refused(tmp_path, parallel, ranks, message):
    path = config(tmp_path, parallel=parallel)
    with pytest.raises(ConfigError, match=message):
        check_command(["train", path], ranks, [])
    train = {"steps": 1, "global_batch_size": 4}
    assert check_command(["train", config(tmp_path, parallel=parallel, train=train)], 4, []) == []


def test_each_command_takes_its_own_configuration_alone(tmp_path):
    with pytest.raises(ConfigError, match="of `mixcpt train`"):
        check_command(["align", config(tmp_path)], 1, [])
    with pytest.raises(ConfigError, match="of `mixcpt align`"):
        check_command(["train", config(tmp_path, align={"method": "sft"})], 1, [])
