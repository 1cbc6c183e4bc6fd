"""A cached teacher against the online one on every grid; jobs that are killed; caches that do not belong."""

import hashlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.cli import main
from megatron_mixcpt.config import Config, validate
from megatron_mixcpt.errors import ConfigError, VerificationError
from megatron_mixcpt.files import WriteError
from megatron_mixcpt.teacher import cache_fill, cache_format
from megatron_mixcpt.train.loop import train
from tests.helpers.corpus import write_mix
from tests.helpers.ports import free_port
from tests.helpers.spawn import run_distributed
from tests.model.families import make
from tests.teacher.runs import VOCABULARY, fill, records
from tests.train.runs import run_steps, settings

GRIDS = {
    "one": (1, {}),
    "TP2+SP": (2, {"parallel": {"tensor": 2, "sequence": True}}),
    "PP2": (2, {"parallel": {"pipeline": 2}}),
    "DP2": (2, {}),
}


def cached(mix, folder, cache, **sections):
    return settings(mix, folder, **{"teacher": {"source": "cached", "cache": str(cache)}} | sections)


def files(cache):
    """Hash of every file that training reads."""
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and "index" not in path.parts
    }


def _cache_and_train(rank, world_size, jobs):
    """`{name: (port, configuration, configuration of the cache job or None)}`; results of training by name."""
    results = {}
    for name, (ports, values, job) in jobs.items():
        if job is not None:
            os.environ["MASTER_PORT"] = str(ports[0])
            fill(job)
        os.environ["MASTER_PORT"] = str(ports[1])
        results[name] = run_steps(values)
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, results): trained on the online teacher, and on every grid on a cache that the grid itself filled."""
    folder = tmp_path_factory.mktemp("cached")
    mix = write_mix(folder / "data", vocab_size=VOCABULARY, train=13)
    results = {}
    for size in (1, 2):
        jobs = {} if size == 2 else {"online": ((0, free_port()), settings(mix, folder / "online"), None)}
        for name, (world_size, sections) in GRIDS.items():
            if world_size == size:
                values = cached(mix, folder / name, folder / f"cache {name}", **sections)
                jobs[name] = ((free_port(), free_port()), values, values)
        results |= run_distributed(_cache_and_train, size, jobs, timeout=300)[0]
    return folder, mix, results


@pytest.mark.distributed
@pytest.mark.parametrize("grid", GRIDS)
def test_with_the_whole_vocabulary_kept_training_is_that_with_the_online_teacher(world, grid):
    _, _, results = world
    np.testing.assert_allclose(results[grid]["losses"], results["online"]["losses"], rtol=1e-6)
    np.testing.assert_allclose(results[grid]["norms"], results["online"]["norms"], rtol=1e-5)
    for name, gradient in results["online"]["gradients"].items():
        np.testing.assert_allclose(results[grid]["gradients"][name], gradient, atol=1e-6, rtol=0, err_msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("grid", [name for name in GRIDS if name != "one"])
def test_every_grid_fills_the_same_cache(world, grid):
    folder, _, _ = world
    one, other = records(folder / "cache one"), records(folder / f"cache {grid}")
    assert len(one) == 26 and np.array_equal(one["content"], other["content"])
    np.testing.assert_allclose(one["gold"], other["gold"], atol=1e-5)
    np.testing.assert_allclose(one["logp"], other["logp"], atol=1e-5)


def _fill_whole(rank, world_size, values):
    fill(values)


@pytest.mark.distributed
def test_experts_over_ranks_fill_the_same_cache(tmp_path):
    make("qwen3-experts", tmp_path / "model", vocab_size=VOCABULARY)
    mix, model = write_mix(tmp_path / "data", vocab_size=VOCABULARY), {"preset": None, "hf": str(tmp_path / "model")}
    for ranks in (1, 2):
        values = cached(mix, tmp_path / "run", tmp_path / str(ranks), model=model, parallel={"expert": ranks})
        run_distributed(_fill_whole, ranks, values)
    one, other = records(tmp_path / "1"), records(tmp_path / "2")
    assert np.array_equal(one["content"], other["content"])
    np.testing.assert_allclose(one["logp"], other["logp"], atol=1e-5)


def _killed(rank, world_size, values, shards):
    """Dies without warning while it writes shard number `shards`, which is half on disk then."""
    written, write = [], cache_fill.write_shard

    def dying(cache, shard, content):
        written.append(shard)
        if len(written) == shards:
            path = shard.path(cache)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".tmp").write_bytes(content.tobytes()[:100])
            path.write_bytes(content.tobytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        write(cache, shard, content)

    cache_fill.write_shard = dying
    fill(values, top_k=8, bits=16)


def _fill(rank, world_size, values):
    fill(values, top_k=8, bits=16)


def test_a_job_that_is_killed_goes_on_to_identical_files(world, tmp_path):
    _, mix, _ = world
    straight, broken = (cached(mix, tmp_path / "run", tmp_path / name) for name in ("straight", "broken"))
    run_distributed(_fill, 1, straight)
    for shards in (2, 2):  # twice: once anew, once on the way
        with pytest.raises(AssertionError, match="did not finish"):
            run_distributed(_killed, 1, broken, shards)
    assert "shards" not in json.loads((tmp_path / "broken" / "cache.json").read_text())
    with pytest.raises(ConfigError, match="is not finished"):
        train(validate(Config, broken, "test"))
    run_distributed(_fill, 1, broken)
    for name in [*(tmp_path / "broken").rglob("*.tmp")]:
        pytest.fail(f"{name} is left over")
    assert files(tmp_path / "broken") == files(tmp_path / "straight")
    # A damaged shard is mended by the same command.
    victim = sorted((tmp_path / "broken").rglob("*.bin"))[1]
    content = bytearray(victim.read_bytes())
    content[200] ^= 1
    victim.write_bytes(content)
    run_distributed(_fill, 1, broken)
    assert files(tmp_path / "broken") == files(tmp_path / "straight")


@given(st.lists(st.integers(1, 9), max_size=12), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_rounds_end_when_the_last_replica_is_through_and_count_every_sequence(sizes, replicas, micro, width):
    shards = [cache_format.Shard("x", number, 3, 3 + size) for number, size in enumerate(sizes)]
    rounds = list(cache_fill._rounds(shards, replicas, micro, width))
    work = [sum(-(-size // micro) for size in sizes[replica::replicas]) for replica in range(replicas)]
    assert sum(rounds) == sum(sizes) and len(rounds) == max(-(-batches // width) for batches in work)


def test_a_stop_is_75_and_keeps_complete_shards(world, tmp_path):
    _, mix, _ = world
    values = cached(mix, tmp_path / "run", tmp_path / "cache")
    write, fired = cache_fill.write_shard, []

    def stopping(cache, shard, content):
        write(cache, shard, content)
        if not fired:
            fired.append(shard)
            os.kill(os.getpid(), signal.SIGTERM)

    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_fill, "write_shard", stopping)
        patch.setattr(cache_fill, "SHARD_BYTES", 1)
        assert main(["cache-teacher", str(config), "--top-k", "8"]) == 75
        assert cache_format.is_written(tmp_path / "cache", fired[0])
        assert main(["cache-teacher", str(config), "--top-k", "8"]) == 0


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """(values, cache) of a finished cache with 32 of 250 tokens in 16 bits."""
    _, mix, _ = world
    folder = tmp_path_factory.mktemp("small")
    values = cached(mix, folder / "run", folder / "cache")
    fill(values, top_k=32, bits=16)
    return values, folder / "cache"


def changed(values, **sections):
    return validate(
        Config, settings(values["data"]["mix"], values["run_dir"], **{"teacher": values["teacher"]} | sections), "t"
    )


def test_thirty_two_tokens_train_nearly_as_the_whole_teacher(world, small, capsys):
    _, _, results = world
    losses = run_steps(small[0])["losses"]
    online = results["online"]["losses"]
    # A random model has no favourites: most of its mass is tail. The coarser divergence is never above the whole one.
    assert all(found <= whole + 1e-3 for found, whole in zip(losses, online))
    np.testing.assert_allclose(losses, online, rtol=0.05)


def test_at_most_250_bytes_a_token_at_32_tokens():
    for vocabulary in (50_000, 128_256):
        assert cache_format.record_dtype(4096, 32, vocabulary, 16).itemsize / 4096 <= 250


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"temperature": 2.0}}, "was made for loss.temperature 1.0, the run has 2.0"),
        ({"train": {"seed": 5}}, "is of another model"),
    ],
)
def test_a_cache_of_another_loss_or_model_is_refused(small, sections, message):
    values, _ = small
    base = {name: values[name] | part for name, part in sections.items()}
    with pytest.raises(ConfigError, match=message):
        train(changed(values, **base))


def test_a_cache_of_other_data_is_refused(small, tmp_path):
    values, _ = small
    other = write_mix(tmp_path / "data", vocab_size=VOCABULARY, train=13, seed=9)
    with pytest.raises(ConfigError, match="holds nothing of source facts as it is now"):
        train(validate(Config, cached(other, tmp_path / "run", values["teacher"]["cache"]), "t"))


def test_a_cache_of_the_first_format_is_read(small, tmp_path):
    values, cache = small
    shutil.copytree(cache, tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": "mixcpt-teacher-cache/1"}))
    known = run_steps(values)["losses"]
    assert run_steps(values | {"teacher": {"source": "cached", "cache": str(tmp_path / "cache")}})["losses"] == known


def test_another_cache_in_the_directory_is_left_alone(small):
    values, cache = small
    before = files(cache)
    with pytest.raises(ConfigError, match="differs in"):
        fill(values, top_k=4)
    assert files(cache) == before


def test_damage_is_found_when_the_record_is_read(small, tmp_path):
    values, cache = small
    shutil.copytree(cache, tmp_path / "cache")
    for path in (tmp_path / "cache").rglob("*.bin"):
        content = bytearray(path.read_bytes())
        content[1::100] = bytes(value ^ 1 for value in content[1::100])
        path.write_bytes(content)
    with pytest.raises(VerificationError, match=r"record \d+ is damaged: remove its shard"):
        train(validate(Config, cached(values["data"]["mix"], tmp_path / "run", tmp_path / "cache"), "t"))
    next((tmp_path / "cache").rglob("*.bin")).unlink()
    with pytest.raises(ConfigError, match="missing or truncated"):
        train(validate(Config, cached(values["data"]["mix"], tmp_path / "run", tmp_path / "cache"), "t"))


def test_the_command_reports_bytes_a_token_and_training_reads_with_workers(small, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(cached(small[0]["data"]["mix"], tmp_path / "run", tmp_path / "cache")))
    for _ in range(2):  # the second time it is complete already
        assert main(["cache-teacher", str(config)]) == 0
    output, told = capsys.readouterr()
    assert "132.5 bytes a token (32 tokens kept, 16 bits); the tail holds" in output, output
    assert f"{len(records(tmp_path / 'cache'))} training sequences of " in told  # what it costs, before it starts
    assert "--steps" not in told  # the run draws every one of them
    assert main(["cache-teacher", str(config), "train.steps=2"]) == 0
    assert "this run draws 16 of them: --steps caches those alone" in capsys.readouterr().err
    assert main(["train", str(config), "data.num_workers=1", "train.steps=2"]) == 0
    assert main(["cache-teacher", str(config), "teacher.source=initial"]) == 2
    assert main(["cache-teacher", str(config), "--top-k", "251"]) == 2


def _fill_first(rank, world_size, values, steps):
    fill(values, steps=steps)


@pytest.mark.distributed
def test_a_cache_of_the_first_steps_holds_what_they_draw_and_serves_no_other_run(tmp_path):
    mix = write_mix(tmp_path / "data", vocab_size=VOCABULARY, train=40)
    cache = tmp_path / "cache"
    values = cached(mix, tmp_path / "run", cache)
    run_distributed(_fill_first, 2, values, 3, timeout=300)
    assert len(records(cache)) == 24 < 80  # 3 steps of 8, no sequence twice
    known = files(cache)
    three = settings(mix, tmp_path / "three", train=values["train"] | {"steps": 3})
    online = run_steps(three)
    found = run_steps(three | {"teacher": values["teacher"]})
    np.testing.assert_allclose(found["losses"], online["losses"], rtol=1e-6)
    fill(values, steps=3)  # complete already
    assert files(cache) == known

    def refused(message, **sections):
        with pytest.raises(ConfigError, match=message):
            train(validate(Config, cached(mix, tmp_path / "other", cache, **sections), "t"))

    refused("holds only what a run draws with 24 samples, the run draws 32")
    refused("with train.seed 1234, the run has 5", train={**three["train"], "seed": 5})
    path = sorted(cache.rglob("chosen.bin"))[0]
    path.write_bytes(path.read_bytes()[8:])
    refused("chosen.bin is missing or damaged", train=three["train"])


def test_the_steps_to_cache_are_given_or_the_runs(small, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(cached(small[0]["data"]["mix"], tmp_path / "run", tmp_path / "cache")))
    assert main(["cache-teacher", str(config), "train.steps=2", "--steps", "0"]) == 2
    assert "--steps 0: at least 1" in capsys.readouterr().err
    assert main(["cache-teacher", str(config), "train.steps=2", "--steps"]) == 0
    assert len(records(tmp_path / "cache")) == 16
    assert main(["train", str(config), "train.steps=2"]) == 0
    assert main(["cache-teacher", str(config)]) == 2
    assert "differs in draws, sources" in capsys.readouterr().err


def test_a_full_disk_is_told_before_and_while_the_cache_is_written(small, tmp_path, monkeypatch, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(cached(small[0]["data"]["mix"], tmp_path / "run", tmp_path / "cache")))

    def full(*arguments):
        raise WriteError("shard.bin: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache_fill, "write_shard", full)
        assert main(["cache-teacher", str(config)]) == 1
    assert "shard.bin: cannot be written: No space left on device; what is complete is kept" in capsys.readouterr().err
    monkeypatch.setattr(cache_fill.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    assert main(["cache-teacher", str(config)]) == 2
    assert "will take 0.00 GiB, its disk has 0.00 GiB left" in capsys.readouterr().err
