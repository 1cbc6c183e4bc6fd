"""What the study of docs/study.md is made of fits its configurations."""

import json
from pathlib import Path

from benchmarks.study import prepare
from megatron_mixcpt.config import load_config
from megatron_mixcpt.data.mix import open_mix
from megatron_mixcpt.demo.base_model import save_tiny_tokenizer
from megatron_mixcpt.study.cells import Cells
from megatron_mixcpt.study.config import Study
from tests.model.families import make

FILES = Path(prepare.__file__).parent


def small_model(out):
    make("llama-untied", out, vocab_size=1024)
    save_tiny_tokenizer(["The heron stands in the shallow water. "], out)


def test_prepared_data_fits_every_arm_and_nothing_measured_is_trained_on(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "save_smollm2", small_model)
    wanted = prepare.GENERAL_DOCUMENTS + prepare.HELD_OUT_GENERAL
    lines = [f"Paragraph {number} tells of rivers, " + "and of the towns beside them, " * 8 for number in range(wanted)]
    Path("general.txt").write_text("\n".join([*lines, "too short"]))
    articles = [{"text": f"Article {number}: " + "a vein carries blood back. " * 4} for number in range(300)]
    Path("articles.jsonl").write_text("".join(json.dumps(article) + "\n" for article in articles))
    assert prepare.main(["facts", "--general", "general.txt"]) == 0
    assert prepare.main(["medquad", "--general", "general.txt", "--medquad", "articles.jsonl"]) == 0
    for name, runs in (("facts", 55), ("medquad", 55), ("quick", 2)):
        cells = Cells(load_config(Study, FILES / f"{name}.yaml"), name)
        assert cells.num_runs == runs
        measured = {source.name for source in open_mix(cells.mix_path).sources if source.valid}
        assert measured == {"domain", "instructions", "prose", "general"}
    for folder in (tmp_path / "runs/study/facts/texts", tmp_path / "runs/study/medquad/texts"):
        for held_out in folder.glob("*-heldout.jsonl"):
            trained = folder / held_out.name.replace("-heldout", "")
            if trained.is_file():
                assert not set(held_out.read_text().splitlines()) & set(trained.read_text().splitlines())
    assert prepare.main(["medquad"]) == 2 and "--medquad FILE" in capfd.readouterr().err
    Path("few.txt").write_text(lines[0])
    assert prepare.main(["facts", "--general", "few.txt"]) == 2
    assert f"1 texts, {wanted} are needed" in capfd.readouterr().err
