"""Exact containment on word boundaries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixcpt.evaluate.answers import contains_answer, recall

WORDS = st.text(alphabet="abcdefghij", min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "expected", "found"),
    [
        ("An otter.", "otter", True),
        ("OTTER", "otter", True),
        ("It is (an otter)!", "Otter", True),
        ("otters", "otter", False),
        ("rotter", "otter", False),
        ("", "otter", False),
        ("the C++ compiler", "c++", True),
        ("Königsberg, of course", "königsberg", True),
        ("in New  York", "New York", False),
        (
            "\u4e1c\u4eac\u662f\u65e5\u672c\u7684\u9996\u90fd",
            "\u4e1c\u4eac",
            True,
        ),  # Chinese: Tokyo is the capital of Japan
        ("\u6211\u4e0d\u77e5\u9053\u8fd9\u4e2a\u4eba", "\u4e0d\u77e5\u9053", True),
        (
            "\u0e2d\u0e22\u0e39\u0e48\u0e17\u0e35\u0e48\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
            True,
        ),  # Thai
        ("\u7b54\u3048\u306fotter\u3067\u3059", "otter", True),
        ("\u7b54\u3048\u306fotters\u3067\u3059", "otter", False),
    ],
)
def test_an_answer_counts_as_whole_words_in_any_case(text, expected, found):
    assert contains_answer(text, expected) is found


@given(words=st.lists(WORDS, max_size=8), expected=WORDS)
def test_containment_equals_membership_in_the_list_of_words(words, expected):
    assert contains_answer(" ".join(words), expected) == (expected in words)


@given(st.lists(st.booleans(), min_size=1, max_size=20))
def test_recall_is_the_share_of_right_answers(right):
    answers = ["the heron" if hit else "herons" for hit in right]
    assert recall(answers, ["heron"] * len(right)) == sum(right) / len(right)


def test_recall_refuses_lists_that_do_not_belong_together():
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        recall(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 questions"):
        recall([], [])
