"""The example configurations are valid, and each begins where the one before it ended."""

from pathlib import Path

from megatron_mixcpt.cli import parse
from megatron_mixcpt.config import Config, load_config
from megatron_mixcpt.data_prep.config import PreprocessConfig
from megatron_mixcpt.select.config import SelectConfig

FOLDER = Path(__file__).parents[2] / "launch" / "configs" / "two-stages"


def test_the_chain_of_two_stages_fits_together():
    data = load_config(PreprocessConfig, FOLDER / "preprocess.yaml", literal=True)
    stage1 = load_config(Config, FOLDER / "stage1.yaml")
    select = load_config(SelectConfig, FOLDER / "select.yaml")
    sft, dpo = (load_config(Config, FOLDER / f"{name}.yaml") for name in ("sft", "dpo"))
    assert stage1.data.mix == select.data.mix == f"{data.out}/mix.json"
    assert select.model.checkpoint == sft.model.checkpoint == stage1.run_dir
    assert dpo.model.checkpoint == sft.run_dir
    assert [sft.data.mix, dpo.data.mix] == [f"{select.out}/{name}/mix.json" for name in ("sft", "dpo")]
    assert [sft.align.method, dpo.align.method] == ["sft", "dpo"] and not sft.uses_teacher
    assert f"mixcpt export {dpo.run_dir}" in (FOLDER / "run.sh").read_text()


def test_the_model_is_measured_against_the_base_on_the_mixture_of_the_first_stage():
    lines = (FOLDER / "run.sh").read_text().splitlines()
    (command,) = (line.removeprefix("mixcpt ") for line in lines if line.startswith("mixcpt eval"))
    args, stage1 = parse(command.split()), load_config(Config, FOLDER / "stage1.yaml")
    assert (args.model, args.base, args.mix) == ("runs/dpo", stage1.model.hf, stage1.data.mix)
    assert f"mixcpt {command}\n" in (FOLDER.parents[2] / "docs" / "alignment.md").read_text()


def test_the_chain_for_a_cluster_runs_the_same_commands():
    chain = (FOLDER / "chain.yaml").read_text()
    for line in (FOLDER / "run.sh").read_text().splitlines():
        if line.startswith("mixcpt "):
            command = line.removeprefix("mixcpt ").replace('"$configs/', '"launch/configs/two-stages/').replace('"', "")
            assert command.split(" --nproc")[0] in chain
