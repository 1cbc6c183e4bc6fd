"""The configuration of `mixcpt preprocess`: typed, strict, with errors that name the line and the nearest key."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_mixcpt.config.reader import validate
from megatron_mixcpt.config.section import Section
from megatron_mixcpt.data_prep.format import TEXT_KINDS
from megatron_mixcpt.data_prep.template import template_keys

Template = Annotated[str, Field(min_length=1)]
SHARE_KEYS = ("weight", "tokens", "epochs")


class SourceConfig(Section):
    """One named body of text and its share of the mixture."""

    name: str
    kind: Literal["domain", "general", "instruction", "preference"]
    paths: list[str] = Field(default=[])  # files, directories or globs, relative to the working directory
    heldout: list[str] = Field(default=[])  # the same for validation alone, in place of valid_fraction

    # What becomes text; which keys go with which kind is checked below.
    text: Template | None = None
    prompt: Template | None = None
    response: Template | None = None
    chosen: Template | None = None
    rejected: Template | None = None
    messages: str | None = None  # key of a list of {role, content}
    tools: str | None = None  # key of a list of tool descriptions for the chat template

    format: Literal["plain", "chat"] = "plain"
    separator: str = "\n"  # between turns in the plain format
    loss: Literal["all", "answer"] = "all"
    responses: Literal["chosen", "both"] = "chosen"  # which side of a preference pair is trained on as text
    layout: Literal["pack", "concat"] = "pack"

    weight: float | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    epochs: float | None = Field(default=None, gt=0)
    max_epochs: float | None = Field(default=None, gt=0)

    min_tokens: int = Field(default=0, ge=0)
    max_tokens: int | None = Field(default=None, gt=0)
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    too_long: Literal["drop", "truncate", "error"] = "drop"  # conversations of more than seq_length tokens

    @field_validator("name")
    @classmethod
    def _safe_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
            raise ValueError("is used in file names: use letters, digits, '_', '.', '-'")
        return value

    @field_validator("text", "prompt", "response", "chosen", "rejected")
    @classmethod
    def _valid_template(cls, value: str | None) -> str | None:
        if value is not None:
            template_keys(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        given = {key for key in ("text", "prompt", "response", "chosen", "rejected", "messages") if getattr(self, key)}
        wanted = {
            "domain": [{"text"}],
            "general": [{"text"}],
            "instruction": [{"prompt", "response"}, {"messages"}],
            "preference": [
                {"prompt", "chosen", "rejected"},
                {"messages", "chosen", "rejected"},
                {"chosen", "rejected"},
            ],
        }[self.kind]
        if given not in wanted:
            choices = " or ".join(" + ".join(sorted(keys)) for keys in wanted)
            raise ValueError(f"a {self.kind} source takes {choices}; given: {', '.join(sorted(given)) or 'none'}")
        shares = [key for key in SHARE_KEYS if getattr(self, key) is not None]
        if not self.paths and not self.heldout:
            raise ValueError("give paths, or heldout for a source that is only measured")
        if not self.paths:
            shares += ["max_epochs"] if self.max_epochs is not None else []
            if shares:
                raise ValueError(f"a source without paths is only measured and takes no {shares[0]}")
        elif len(shares) != 1:
            raise ValueError(f"give exactly one of weight, tokens, epochs; given: {', '.join(shares) or 'none'}")
        if self.is_text:
            for key, default in (("format", "plain"), ("loss", "all"), ("too_long", "drop")):
                if getattr(self, key) != default:
                    raise ValueError(f"{key}: {getattr(self, key)} makes no sense for a {self.kind} source")
        if not self.is_text and self.layout == "concat":
            raise ValueError("layout: concat would cut conversations; it is for domain and general sources")
        if self.tools and self.format != "chat":
            raise ValueError("tools are written by the chat template; set format: chat")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens {self.max_tokens} is below min_tokens {self.min_tokens}")
        return self

    @property
    def is_text(self) -> bool:
        """Whether a record is one text, which may be cut, and not a conversation."""
        return self.kind in TEXT_KINDS

    @property
    def keys(self) -> list[str]:
        """The keys of a record that this source reads."""
        templates = (self.text, self.prompt, self.response, self.chosen, self.rejected)
        keys = [key for template in templates if template is not None for key in template_keys(template)]
        return list(dict.fromkeys([*keys, *(key for key in (self.messages, self.tools) if key is not None)]))


class NearDuplicates(Section):
    """Removal of records that are nearly the same as an earlier one (MinHash over word n-grams)."""

    threshold: float = Field(default=0.8, gt=0, le=1)  # Jaccard similarity
    ngram: int = Field(default=5, ge=1, le=50)  # words
    permutations: int = Field(default=128, ge=16, le=1024)


class Decontaminate(Section):
    """Search for records that share an n-gram with evaluation files."""

    paths: list[str] = Field(min_length=1)
    ngram: int = Field(default=13, ge=1, le=50)  # words
    action: Literal["drop", "flag"] = "drop"


class PreprocessConfig(Section):
    """A whole `preprocess.yaml`."""

    tokenizer: str  # Hugging Face directory, tokenizer.json, or SentencePiece .model
    out: str
    seq_length: int = Field(ge=8, le=2**24)  # tokens in every stored sequence
    sources: list[SourceConfig] = Field(min_length=1)
    valid_fraction: float = Field(default=0.02, ge=0, lt=1)
    seed: int = Field(default=1234, ge=0, lt=2**63)

    add_bos: bool | None = None  # null: as the tokenizer itself does
    eos_token: str | None = None  # null: as the tokenizer's own configuration says
    exact_duplicates: Literal["drop", "keep"] = "drop"  # over all sources
    near_duplicates: NearDuplicates | None = None
    decontaminate: Decontaminate | None = None
    engine: Literal["auto", "reference"] = "auto"  # auto: the fast one where it agrees with the reference
    total_tokens: int | None = Field(default=None, gt=0)  # training budget; null: what the shares need
    share_of: Literal["tokens", "targets"] = "tokens"
    max_record_bytes: int = Field(default=16 * 2**20, gt=0)

    @model_validator(mode="after")
    def _names_differ(self) -> "PreprocessConfig":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are named {twice[0]!r}")
        return self

    @model_validator(mode="after")
    def _shares_can_be_met(self) -> "PreprocessConfig":
        # Known before any work: beside fixed amounts and without a total, weights are fractions of the whole.
        weights = sum(source.weight for source in self.sources if source.weight is not None)
        fixed = any(source.weight is None for source in self.sources if source.paths)  # others ask for nothing
        if fixed and weights >= 1 and self.total_tokens is None:
            raise ValueError(
                "beside sources with tokens or epochs, weights are fractions of the whole and must sum to less than 1; "
                f"they sum to {weights:g} (or give total_tokens)"
            )
        return self


def parse_config(values: dict[str, Any]) -> PreprocessConfig:
    """Check plain values that no file holds. Raises ConfigError that names the key."""
    return validate(PreprocessConfig, values, "config")
