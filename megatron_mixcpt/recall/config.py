"""Configuration of `mixcpt recall`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_mixcpt.config import NonNegative, Positive, Section
from megatron_mixcpt.recall.language import LANGUAGES

Probability = Annotated[float, Field(gt=0.0, le=1.0)]
INSTRUCTIONS, TEXT = "instructions", "text"
Stream = Literal["instructions", "text"]


class RecallModel(Section):
    """The model that remembers."""

    hf: str
    """Hugging Face directory; with engine openai only its tokenizer is read, for the chat template and start token."""


class Amounts(Section):
    """Samples that are drawn. What the filters reject is not replaced: a larger number draws only the rest."""

    instructions: NonNegative = 0
    """Pairs of instruction and answer, both the model's, from nothing but the opening of its chat template."""
    text: NonNegative = 0
    """Free texts, from the start token or from an opening."""

    @model_validator(mode="after")
    def _something(self) -> Amounts:
        if not self.instructions + self.text:
            raise ValueError("n.instructions and n.text are both 0: there is nothing to draw")
        return self


class TextSettings(Section):
    """How free texts begin."""

    openings: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    """Share that continues a short opening; all others begin with the start token alone."""
    openings_file: str | None = None
    """Text file with an opening a line (topics, first words); a short general list when not given."""
    start_token: str | None = None
    """Control token that a text begins with; the tokenizer's bos when not given."""


class SamplingSettings(Section):
    """How tokens are drawn."""

    temperatures: Annotated[list[Annotated[float, Field(gt=0.0, le=10.0)]], Field(min_length=1)] = Field(
        default=[0.7, 1.0]
    )
    """Each sample takes one of them."""
    top_p: Probability = 0.95
    """Share of the probability that is drawn from, most likely tokens first; 1: the model's whole distribution."""
    max_instruction_tokens: Positive = 256
    """Length at which an instruction is given up."""
    max_answer_tokens: Positive = 1024
    """Length at which an answer is given up."""
    max_text_tokens: Positive = 1024
    """Length at which a text is cut."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234
    """Decides, with a sample's number, everything that is drawn for it."""


class TransformersEngine(Section):
    """The model in this process, on every rank: what a sample becomes is a function of these keys and the seed."""

    batch_size: Positive = 32
    """Samples computed together."""
    block_size: Positive = 64
    """Consecutive samples that a rank takes, sorts by length, computes and stores at a time; a kill costs one block."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Of the model."""
    threads: Positive = 1
    """Cores that a rank computes with on a CPU; sums over other numbers of cores differ in their last bits, and so
    would samples. More ranks (`--nproc`) change nothing."""


class OpenAIEngine(Section):
    """A server with the interface of OpenAI's `/v1/completions`: vLLM, SGLang, llama.cpp, `transformers serve`."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Address up to and with `/v1`. A key, if the server wants one, comes from the environment: OPENAI_API_KEY."""
    model: str
    """The server's name of the model."""
    prompts: Literal["tokens", "text"] = "tokens"
    """tokens: prompts as token numbers, which vLLM, SGLang and llama.cpp take; text: for servers that know OpenAI's
    own fields alone, as `transformers serve`."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 16
    """Requests of a rank at a time."""
    block_size: Positive = 256
    """Consecutive samples that a rank takes at a time; each answer is stored when it comes."""
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 300.0
    """For one answer."""
    patience_seconds: Annotated[float, Field(ge=0.0)] = 120.0
    """A server that has given no answer for so long is gone: the command ends with 75, and goes on when run again."""


class Engine(Section):
    """What computes: exactly one."""

    transformers: TransformersEngine | None = None
    """The model in this process; `engine: transformers` alone takes the defaults."""
    openai: OpenAIEngine | None = None
    """A server, as {openai: {url: http://host:8000/v1, model: name}}."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"transformers": {}} if value == "transformers" else value

    @model_validator(mode="after")
    def _one(self) -> Engine:
        if (self.transformers is None) == (self.openai is None):
            raise ValueError("engine: set exactly one of engine.transformers and engine.openai")
        return self

    @property
    def block_size(self) -> int:
        one = self.transformers or self.openai
        assert one is not None
        return one.block_size


class NearDuplicateSettings(Section):
    """MinHash over word n-grams of the instruction, or of the text; of each group the first sample stays."""

    threshold: Probability = 0.7
    """Jaccard similarity of two samples that are near duplicates."""
    ngram: Annotated[int, Field(ge=1, le=50)] = 3
    """Words."""
    permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    """Length of a signature; 4 bytes each."""


class Overlap(Section):
    """Samples that share word n-grams with some files."""

    paths: Annotated[list[str], Field(min_length=1)]
    """Files, directories or globs, in the formats of `mixcpt preprocess`; every string in them counts."""
    ngram: Annotated[int, Field(ge=1, le=50)] = 13
    """Words."""
    action: Literal["reject", "measure"] = "reject"
    """measure: count alone."""


class Filters(Section):
    """What is rejected; every rejected sample is kept in rejected.jsonl with its reason."""

    min_instruction_tokens: NonNegative = 3
    """Shorter instructions are rejected."""
    min_answer_tokens: NonNegative = 1
    """Shorter answers are rejected."""
    min_text_tokens: NonNegative = 16
    """Shorter texts are rejected."""
    unfinished: list[Stream] = Field(default=["instructions"])
    """Streams whose samples are rejected where they reach their length limit; a cut text is still good text."""
    max_repetition: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    """Highest share of a part's token 4-grams that repeat an earlier one."""
    languages: list[Literal[LANGUAGES]] = Field(default=[])  # type: ignore[valid-type]
    """Languages that are kept, by ISO code; empty: all. What is too short to tell is kept."""
    max_perplexity: Annotated[float, Field(gt=1.0)] = 50.0
    """Highest perplexity of an answer, or text, under the model itself at temperature 1, where the engine tells it."""
    near_duplicates: NearDuplicateSettings | None = NearDuplicateSettings()
    """null keeps near duplicates."""


class RecallConfig(Section):
    """`mixcpt recall CONFIG`."""

    model: RecallModel
    n: Amounts
    out: str
    """Folder of the result: instructions.jsonl, text.jsonl, rejected.jsonl, tokens.jsonl, recall.json, report."""
    engine: Engine = Engine(transformers=TransformersEngine())
    text: TextSettings = TextSettings()
    sampling: SamplingSettings = SamplingSettings()
    filters: Filters = Filters()
    overlap: dict[str, Overlap] = Field(default={})
    """Named searches for common n-grams, as `{domain: {paths: [docs/*.jsonl], action: measure}, evaluation: {paths:
    [eval.jsonl]}}`."""

    def amount(self, stream: str) -> int:
        """Samples of a stream."""
        return int(getattr(self.n, stream))
