"""Checkpoints that every rank writes and reads a share of: any layout from any other, old formats, megatron-core's."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash

from megatron_mixcpt.checkpoint import Saver, list_checkpoints, load_checkpoint, save_checkpoint
from megatron_mixcpt.checkpoint import state as state_module
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.errors import VerificationError
from megatron_mixcpt.runtime.parallel import parallel_context
from megatron_mixcpt.train.loop import train
from megatron_mixcpt.train.setup import build
from tests.helpers.nano import use_nano
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.train.runs import losses, saved_tensors, settings

STORED = Path(__file__).parent / "stored" / "format_1"
EXPECTED = json.loads((STORED / "expected.json").read_text())
DISTRIBUTED = {"train": {"distributed_optimizer": True}}
LAYOUTS = {  # name -> (ranks, settings)
    "one process": (1, {}),
    "DP2": (2, {}),
    "DP2 distributed optimizer": (2, DISTRIBUTED),
    "TP2": (2, {"parallel": {"tensor": 2}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "DP4 distributed optimizer": (4, DISTRIBUTED),
    "TP2 x DP2 distributed optimizer": (4, DISTRIBUTED | {"parallel": {"tensor": 2}}),
}


def configuration(run_dir, sections, **train):
    sections = dict(sections)
    train = {"dtype": "bf16", **sections.pop("train", {}), **train}
    values = settings(
        STORED / "data" / "mix.json", run_dir, train=train, checkpoint={"every": 2, "keep": 5}, **sections
    )
    return values | {"model": {"preset": "nano"}}


def hashes(checkpoint):
    """By key; the optimizer's under the names of format 1, and without padding beyond the stored checkpoint's."""
    found = {}
    for key, tensor in saved_tensors(checkpoint).items():
        key = key.replace("optimizer.state.fp32_param.", "optimizer.master.").replace("optimizer.state.", "optimizer.")
        if "word_embeddings" in key:
            assert not tensor[128:].any()
            tensor = tensor[:128]
        content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        found[key] = xxhash.xxh3_128_hexdigest(content)
    return found


def load_and_save(rank, world_size, runs):
    """Load a checkpoint into each layout and save it from there; bytes read of tensors by layout."""
    use_nano()
    read, reader = {}, state_module.read_boxes

    for name, (port, values, source, target) in runs.items():
        os.environ["MASTER_PORT"] = str(port)

        def counting(*args, name=name):
            read[name] = reader(*args)

        state_module.read_boxes = counting
        config = validate(Config, values, "test")
        grid = config.parallel
        with parallel_context(grid.tensor, grid.pipeline) as state:
            parts = build(config, state)
            load_checkpoint(source, parts.model, parts.optimizer)
            save_checkpoint(target, 2, parts.model, parts.optimizer)
    return read


def go_on(rank, world_size, values):
    use_nano()
    train(validate(Config, values, "test"))


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """`(folder with one checkpoint a layout, bytes read of tensors by layout and rank)`, from the stored checkpoint and
    then from that of four ranks back into all layouts."""
    folder, read = tmp_path_factory.mktemp("moved"), {}
    source = STORED / "step_00000002"
    for stage in ("stored", "again"):
        for ranks in (4, 2, 1):
            chosen = {name: sections for name, (size, sections) in LAYOUTS.items() if size == ranks}
            runs = {
                f"{stage} {name}": (free_port(), configuration(folder / "run", s), source, folder / f"{stage} {name}")
                for name, s in chosen.items()
            }
            found = run_distributed(load_and_save, ranks, runs, timeout=300)
            read |= {name: [of_rank[name] for of_rank in found] for name in runs}
        source = folder / "stored DP4 distributed optimizer" / "step_00000002"
    return folder, read


@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["stored", "again"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_bit_goes_from_any_layout_into_any_other(moved, stage, name):
    """The stored checkpoint is of format 1 and of two ranks; what it holds was hashed when it was written."""
    (checkpoint,) = list_checkpoints(moved[0] / f"{stage} {name}")
    assert hashes(checkpoint) == EXPECTED["tensors"]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["DP2", "DP2 distributed optimizer", "DP4 distributed optimizer"])
def test_every_byte_is_read_once_by_a_group_of_replicas_and_all_read_as_much(moved, name):
    """Stored items are at most three times the smallest share here: the model is tiny."""
    folder, read = moved
    source = folder / "stored DP4 distributed optimizer" / "step_00000002"
    stored = sum(path.stat().st_size for path in source.glob("*.distcp"))
    shares = read[f"again {name}"]
    assert sum(shares) == stored
    assert max(shares) < 1.5 * stored / len(shares)


@pytest.mark.distributed
def test_every_rank_writes_a_share(moved):
    sizes = [
        path.stat().st_size
        for path in sorted((moved[0] / "stored DP4 distributed optimizer" / "step_00000002").glob("*.distcp"))
    ]
    assert len(sizes) == 4 and max(sizes) < 1.5 * sum(sizes) / 4


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2])
def test_a_run_of_an_earlier_version_goes_on(tmp_path, ranks):
    """The stored checkpoint and the losses that followed it were written by format 1."""
    target = tmp_path / "run" / "checkpoints" / "step_00000002"
    shutil.copytree(STORED / "step_00000002", target)
    run_distributed(go_on, ranks, configuration(tmp_path / "run", DISTRIBUTED), timeout=300)
    found = losses(tmp_path / "run")
    assert found == pytest.approx({step: EXPECTED["losses"][str(step)] for step in (3, 4)}, rel=1e-5)


def read_by_megatron(rank, world_size, values, checkpoint):
    """What megatron-core's own loader makes of a checkpoint: weights, moments, master weights and steps as we load
    them."""
    from megatron.core import dist_checkpointing

    use_nano()
    config = validate(Config, values, "test")
    with parallel_context() as state:
        ours, theirs = build(config, state), build(config, state)
        load_checkpoint(checkpoint, ours.model, ours.optimizer)
        model = theirs.model.module
        sharded = model.sharded_state_dict()
        wanted = {"model": sharded, "optimizer": theirs.optimizer.sharded_state_dict(sharded, is_loading=True)}
        loaded = dist_checkpointing.load(wanted, str(checkpoint))
        model.load_state_dict(loaded["model"])
        theirs.optimizer.load_state_dict(loaded["optimizer"])
        return _flat(ours) == _flat(theirs), len(_flat(ours))


def _flat(parts):
    """All values that Adam goes on from."""
    values = [parameter.detach().float().tolist() for parameter in parts.model.parameters()]
    for single in parts.optimizer.chained_optimizers:
        for group in single.optimizer.param_groups:
            for main in group["params"]:
                values.append(main.detach().tolist())
                values += [value.tolist() for _, value in sorted(single.optimizer.state[main].items())]
    return values


@pytest.mark.distributed
def test_megatron_core_reads_weights_and_optimizer_with_its_own_loader(moved, tmp_path):
    checkpoint = moved[0] / "stored DP4 distributed optimizer" / "step_00000002"
    same, count = run_distributed(read_by_megatron, 1, configuration(tmp_path / "run", {}), checkpoint)[0]
    assert same and count > 30


def refuse(rank, world_size, values, checkpoints):
    """How each checkpoint is refused."""
    use_nano()
    config, messages = validate(Config, values, "test"), []
    with parallel_context() as state:
        parts = build(config, state)
        for checkpoint in checkpoints:
            try:
                load_checkpoint(checkpoint, parts.model, parts.optimizer)
            except VerificationError as error:
                messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_what_cannot_be_read_is_told_on_every_rank(moved, tmp_path):
    """A file that only one rank reads is cut off, after it was verified; and a checkpoint of fewer tensors."""
    source = moved[0] / "stored DP4 distributed optimizer" / "step_00000002"
    cut, other = tmp_path / "cut", tmp_path / "other"
    for target in (cut, other):
        shutil.copytree(source, target)
    os.truncate(cut / "__3_0.distcp", 1000)
    (other / "checkpoint.json").write_text(
        (other / "checkpoint.json").read_text().replace("checkpoint/2", "checkpoint/1")
    )
    values = configuration(tmp_path / "run", DISTRIBUTED)
    messages = run_distributed(refuse, 2, values, [cut, other], timeout=120)
    assert messages[0] == messages[1]
    assert "cannot be read" in messages[0][0] and "holds no optimizer.master" in messages[0][1]


def snapshot(rank, world_size, values):
    """(bytes copied by a save in the background, bytes foreseen)."""
    from megatron_mixcpt.plan.estimate import make_plan
    from megatron_mixcpt.train.setup import read_model_and_mix

    use_nano()
    config = validate(Config, values, "test")
    with parallel_context() as state:
        parts = build(config, state)
        saver = Saver(Path(config.run_dir) / "checkpoints", background=True)
        saver.begin(1, parts.model, parts.optimizer)
        assert saver.finish().path is not None
        copied = sum(buffer.numel() * buffer.element_size() for buffer in saver._buffers.values())
        return copied, make_plan(config, *read_model_and_mix(config), world_size).stages[0].snapshot


@pytest.mark.distributed
@pytest.mark.parametrize("distributed", [True, False])
def test_a_save_in_the_background_copies_as_much_as_planned(tmp_path, distributed):
    values = configuration(tmp_path / "run", {}, distributed_optimizer=distributed)
    values["checkpoint"]["async"] = True
    found = run_distributed(snapshot, 2, values, timeout=120)
    copied, foreseen = zip(*found)
    assert sum(copied) == pytest.approx(sum(foreseen), abs=len(found))
    assert max(copied) < 1.2 * foreseen[0]


def save_beside_one_that_cannot_be_removed(rank, world_size, values):
    """Outcomes of two saves of which one is kept, where nothing can be renamed or removed."""
    from megatron_mixcpt.checkpoint import saver as module

    def refused(*args, **kwargs):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    use_nano()
    config = validate(Config, values, "test")
    with parallel_context() as state:
        parts = build(config, state)
        saver = Saver(Path(config.run_dir) / "checkpoints", keep=1)
        module.prune = refused
        outcomes = []
        for step in (1, 2):
            saver.begin(step, parts.model, parts.optimizer)
            outcomes.append(saver.finish())
    return [(outcome.path.name, outcome.error) for outcome in outcomes]


@pytest.mark.distributed
def test_a_checkpoint_is_saved_also_where_an_old_one_cannot_be_removed(tmp_path):
    values = configuration(tmp_path / "run", {})
    (outcomes,) = run_distributed(save_beside_one_that_cannot_be_removed, 1, values, timeout=120)
    assert outcomes == [("step_00000001", None), ("step_00000002", None)]
