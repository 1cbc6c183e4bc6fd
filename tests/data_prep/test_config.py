"""Configuration errors name file, line, key and the fix."""

import pytest

from megatron_mixcpt.config.reader import load_config
from megatron_mixcpt.data_prep.config import PreprocessConfig
from megatron_mixcpt.errors import ConfigError

GOOD = """tokenizer: tok
out: out
seq_length: 512
sources:
  - {name: a, kind: domain, paths: [a.jsonl], text: "{text}", weight: 0.7}
  - name: b
    kind: instruction
    paths: [b.jsonl]
    prompt: "{instruction}"
    response: "{response}"
    weight: 0.3
"""

CASES = [
    ("seq_length: 512", "seq_lenght: 512", r":3: seq_lenght: unknown key; did you mean seq_length\?"),
    ("seq_length: 512\n", "", r"seq_length: required"),
    ("seq_length: 512", "seq_length: 4", r":3: seq_length: .*greater than or equal to 8 \(got 4\)"),
    ("    weight: 0.3", "    wieght: 0.3", r":11: sources\.1\.wieght: unknown key; did you mean sources\.1\.weight\?"),
    ("    weight: 0.3", "    weight: 0.3\n    tokens: 5", r":6: .*exactly one of weight, tokens, epochs"),
    ("    weight: 0.3", "    weight: 0.3\n    weight: 0.4", r":12: key 'weight' is given twice"),
    ('response: "{response}"', 'response: "plain"', r":10: .*reads no key of the record"),
    ('response: "{response}"', 'response: "{a!r}"', r"literal braces doubled"),
    ("    kind: instruction", "    kind: chat", r":7: .*'domain', .*'instruction' or 'preference' \(got 'chat'\)"),
    ("name: b", "name: a", r"two sources are named 'a'"),
    ("name: b", "name: b/c", r":6: .*used in file names"),
    ('    prompt: "{instruction}"\n', "", r":6: .*an instruction source takes|a instruction source takes"),
    ("weight: 0.7}", "epochs: 1}", None),
    (
        "weight: 0.7}\n  - name: b",
        'epochs: 1}\n  - {name: c, kind: domain, paths: [c], text: "{t}", weight: 1}\n  - name: b',
        "must sum to less than 1; they sum to 1.3",
    ),
    ("out: out", "out: [", r":\d+: cannot be read as YAML"),
]


def test_the_documented_example_loads(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(GOOD)
    config = load_config(PreprocessConfig, path, literal=True)
    assert [source.name for source in config.sources] == ["a", "b"]
    assert config.valid_fraction == 0.02 and config.seed == 1234


@pytest.mark.parametrize("old, new, message", CASES)
def test_a_mistake_is_explained(tmp_path, old, new, message):
    path = tmp_path / "p.yaml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new, 1))
    if message is None:  # a change that is no mistake
        load_config(PreprocessConfig, path, literal=True)
        return
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(PreprocessConfig, path, literal=True)
    assert caught.value.exit_code == 2


def test_a_missing_file_is_explained(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(PreprocessConfig, tmp_path / "none.yaml", literal=True)
