"""Tokenizers and engines against their own libraries, and control strings that must stay text."""

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megatron_mixcpt.data_prep import engines
from megatron_mixcpt.data_prep.config import parse_config
from megatron_mixcpt.data_prep.documents import Batch
from megatron_mixcpt.data_prep.engines import (
    FastEngine,
    adversarial_texts,
    disagreement,
    first_difference,
    load_fast_engine,
)
from megatron_mixcpt.data_prep.literals import literal_counter
from megatron_mixcpt.data_prep.pipeline import preprocess
from megatron_mixcpt.data_prep.tokenizer import load_tokenizer
from megatron_mixcpt.errors import ConfigError
from tests.data_prep.conftest import sentences
from tests.data_prep.helpers import digests


@pytest.fixture(scope="session")
def metaspace_dir(tmp_path_factory) -> Path:
    """A Llama-2-like tokenizer.json: BPE with byte fallback and a space put before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("metaspace")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences(300), trainer)
    definition = json.loads(tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    vocabulary.update({f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)})
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(sentences(200)),
        model_prefix=str(folder / "m"),
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    return folder / "m.model"


def encode(tokenizer, texts):
    ids, offsets = tokenizer.engine.encode(texts)
    return [ids[a:b].tolist() for a, b in pairwise(offsets)]


def test_a_gguf_directory_as_tokenizer_names_the_commands_that_make_one(tmp_path):
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match=f"mixcpt convert --hf {tmp_path} --out CKPT && mixcpt export CKPT"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_dir", "metaspace_dir"])
def test_ids_are_those_of_transformers(request, name):
    from transformers import AutoTokenizer

    folder = request.getfixturevalue(name)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder)
    texts = [*sentences(30, seed=8), *(text for text in adversarial_texts([]) if text and "<s>" not in text)]
    assert encode(ours, texts) == [theirs(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert ours.vocab_size == len(theirs)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)


def test_sentencepiece_ids_are_those_of_the_library(sentencepiece_model):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    ours = load_tokenizer(sentencepiece_model)
    texts = [*sentences(30, seed=8), *adversarial_texts(["<s>", "</s>"])]
    assert encode(ours, texts) == theirs.encode(texts)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (len(theirs), theirs.bos_id(), theirs.eos_id())
    assert not {1, 2} & {token for ids in encode(ours, ["<s> a </s>"]) for token in ids}


@pytest.mark.parametrize("name", ["tokenizer_dir", "metaspace_dir"])
def test_control_strings_are_encoded_as_text(request, name):
    tokenizer = load_tokenizer(request.getfixturevalue(name))
    text = "a " + " b ".join(tokenizer.control) + " c"
    (ids,) = encode(tokenizer, [text])
    assert not set(ids) & (set(tokenizer.control.values()) - {tokenizer.control.get("<unk>")})
    assert literal_counter(tokenizer.control)([text, "x", text]) == 2 * len(tokenizer.control)
    assert literal_counter(tokenizer.control)(["no control here < | <x|"]) == 0


def fast_engine_of(folder):
    tokenizer = load_tokenizer(folder)
    return load_fast_engine(tokenizer.definition, tokenizer.engine)


def test_a_text_that_the_fast_engine_refuses_goes_to_the_reference(tokenizer_dir, tmp_path):
    """A byte-level vocabulary may lack bytes: the reference leaves them out, the fast engine raises."""
    folder = tmp_path / "gap"
    shutil.copytree(tokenizer_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop("\u0113")  # how byte-level BPE spells byte 0x13
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer, fast = load_tokenizer(folder), fast_engine_of(folder)
    texts = [*sentences(9), "a\x13b", *sentences(30, seed=3), "\x13", "c"]
    assert first_difference(tokenizer.engine, fast, texts) is None
    assert fast.num_refused == 2
    assert disagreement(tokenizer.engine, fast, adversarial_texts(tokenizer.control)) is None


def test_a_tokenizer_that_the_fast_engine_does_not_know_is_left_to_the_reference(metaspace_dir):
    assert "does not know this tokenizer" in fast_engine_of(metaspace_dir)
    assert "none for this kind" in load_fast_engine(None, load_tokenizer(metaspace_dir).engine)


def test_the_fast_engine_agrees_on_random_documents(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    fast = fast_engine_of(tokenizer_dir)
    rng = random.Random(6)
    pool = [*sentences(200, seed=4), *adversarial_texts(tokenizer.control)]
    texts = ["".join(rng.choices(pool, k=rng.randint(1, 5)))[: rng.randint(1, 400)] for _ in range(1500)]
    assert first_difference(tokenizer.engine, fast, texts) is None


class Liar:
    name = "liar"

    def __init__(self, engine, wrong):
        self._engine, self._wrong = engine, wrong

    def encode(self, texts):
        return self._engine.encode([text.replace(*self._wrong) for text in texts])


@pytest.mark.parametrize("wrong", [("", ""), ("½", "1"), ("語", "文")])
def test_an_engine_that_differs_anywhere_in_the_sample_is_turned_down(tokenizer_dir, wrong):
    tokenizer = load_tokenizer(tokenizer_dir)
    reason = disagreement(tokenizer.engine, Liar(tokenizer.engine, wrong), adversarial_texts(tokenizer.control))
    assert reason is None if wrong == ("", "") else "differs from the reference on" in reason


def test_a_wrong_fast_engine_is_not_used_and_that_is_said(config_values, tmp_path, monkeypatch, capsys):
    preprocess(parse_config({**config_values, "engine": "reference"}))
    assert "fast" not in capsys.readouterr().err
    want = digests(Path(config_values["out"]))

    class Wrong(FastEngine):
        def encode(self, texts):
            # Wrong only where real text has "liver": the adversarial texts do not show it.
            return super().encode([text.replace("liver", "river") for text in texts])

    monkeypatch.setattr(engines, "FastEngine", Wrong)
    other = {**config_values, "out": str(tmp_path / "other")}
    preprocess(parse_config(other))
    said = capsys.readouterr().err
    assert said.count("no fast engine: fastokens differs from the reference on") == 3
    got = digests(tmp_path / "other")
    # Only the manifest tells which engine was asked for.
    assert {name: got[name] for name in got if name != "manifest.json"} == {
        name: want[name] for name in want if name != "manifest.json"
    }


def test_both_engines_give_the_same_bytes(config_values, tmp_path):
    preprocess(parse_config({**config_values, "engine": "reference"}))
    preprocess(parse_config({**config_values, "out": str(tmp_path / "other")}))
    want, got = digests(Path(config_values["out"])), digests(tmp_path / "other")
    assert {name for name in want if want[name] != got.get(name)} == {"manifest.json"}


def test_an_answer_that_follows_its_prompt_gets_no_extra_space(metaspace_dir, sentencepiece_model):
    for path in (metaspace_dir, sentencepiece_model):
        tokenizer = load_tokenizer(path)
        assert tokenizer.joining is not None
        batch = Batch(tokenizer.joining)
        batch.add([("the liver of a patient:", 0), ("surgery", 0), (" or drugs", 0), (tokenizer.eos_id, 0)])
        batch.add([("surgery", 0)])
        tokens, _, lengths = batch.encode(tokenizer.engine)
        first, second = np.split(tokens, [lengths[0]])
        assert tokenizer.decode(first[:-1].tolist()) == "the liver of a patient:surgery or drugs"
        assert second.tolist() == encode(tokenizer, ["surgery"])[0]


def test_a_byte_level_tokenizer_needs_no_joining(tokenizer_dir):
    assert load_tokenizer(tokenizer_dir).joining is None


def test_sentencepiece_runs_end_to_end(config_values, sentencepiece_model):
    from megatron_mixcpt.data_prep.verify import verify

    config_values["tokenizer"] = str(sentencepiece_model)
    for source in config_values["sources"]:
        source["max_bad_fraction"] = 0.9
    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    assert (out / "tokenizer" / "tokenizer.model").is_file()
    assert verify(out, sample=60).problems == []


def test_bos_is_added_where_the_tokenizer_adds_it(config_values, tokenizer_dir, tmp_path):
    from tests.data_prep.helpers import documents_of, load_mix, source_of

    folder = tmp_path / "with bos"
    shutil.copytree(tokenizer_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|im_start|>"}))
    for add_bos, want in ((None, 1), (True, 1), (False, 0)):
        values = {**config_values, "tokenizer": str(folder), "add_bos": add_bos}
        preprocess(parse_config(values))
        out = Path(values["out"])
        for tokens, _ in documents_of(out, source_of(load_mix(out), "ask")["train"]["prefix"]):
            assert tokens.tolist().count(1) == want and (tokens[0] == 1) == bool(want)


def test_a_record_of_which_the_tokenizer_leaves_nothing_is_quarantined(config_values, tokenizer_dir, tmp_path, corpus):
    folder = tmp_path / "forgetful"
    shutil.copytree(tokenizer_dir, folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Replace", "pattern": {"Regex": "x+"}, "content": ""}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    lines = [{"instruction": "xx", "response": "xxx"}, {"instruction": "a", "response": "b"}]
    corpus["instruction"].write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {**config_values["sources"][1], "format": "chat", "max_bad_fraction": 0.5}
    config_values.update(tokenizer=str(folder), sources=[source], valid_fraction=0.0)
    preprocess(parse_config(config_values))
    (row,) = [json.loads(row) for row in (Path(config_values["out"]) / "quarantine.jsonl").read_text().splitlines()]
    assert (row["line"], row["reason"]) == (1, "no tokens")


def test_unusable_tokenizers_are_explained(tokenizer_dir, tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "x.json")
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(ConfigError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    alone = tmp_path / "tokenizer.json"
    shutil.copy(tokenizer_dir / "tokenizer.json", alone)
    with pytest.raises(ConfigError, match=r"set eos_token to one of: <\|endoftext\|>, <\|im_start\|>"):
        load_tokenizer(alone)
    with pytest.raises(ConfigError, match="'<eos>' is not in the vocabulary"):
        load_tokenizer(alone, eos_token="<eos>")
    assert load_tokenizer(alone, eos_token="<|im_end|>").eos_id == 2


@pytest.mark.parametrize("size, dtype", [(65499, "uint16"), (65500, "int32"), (65537, "int32")])
def test_the_vocabulary_decides_the_width_of_tokens(config_values, tmp_path, size, dtype):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from megatron_mixcpt.data_prep.format import open_indexed
    from megatron_mixcpt.data_prep.verify import verify
    from tests.data_prep.helpers import load_mix, source_of

    words = {word: i for i, word in enumerate(sorted({w for t in sentences(300) for w in t.split()}))}
    words.update({f"w{i}": i for i in range(len(words), size - 1)})
    tokenizer = Tokenizer(models.WordLevel({**words, "</s>": size - 1}, unk_token="w5000"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config_values.update(tokenizer=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    config_values["sources"] = config_values["sources"][:1]
    preprocess(parse_config(config_values))
    out = Path(config_values["out"])
    mix = load_mix(out)
    assert mix["tokenizer"]["vocab_size"] == size
    opened = open_indexed(out / source_of(mix, "docs")["train"]["prefix"])
    assert opened.dtype == np.dtype(dtype) and int(opened.tokens.max()) == size - 1
    assert verify(out, sample=20).problems == []
