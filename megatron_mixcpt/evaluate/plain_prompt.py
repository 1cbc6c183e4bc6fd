"""How a question is put to a model without a chat template, in training as in evaluation."""

QUESTION_PREFIX, ANSWER_PREFIX = "Question: ", "\nAnswer:"


def plain_prompt(question: str) -> str:
    """The prompt for `question`; the answer goes on with a space."""
    return f"{QUESTION_PREFIX}{question}{ANSWER_PREFIX}"
