"""The reference: transformers' own model in one process, document by document, under the formulas of formulas.py.

It shares no code with the trainer's model, attention, loss, teacher, adapters or data loading (a contract of `make
lint`): it reads the stored rows by itself and sees each document alone, so that none can see another.

Shapes: d documents, l tokens of the longest, v vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from megatron_mixcpt.certify.documents import Document
from megatron_mixcpt.certify.experts import Routers, adapted_experts, is_expert, parameters_of
from megatron_mixcpt.certify.formulas import cross_entropy, distillation_target, divergence, preference
from megatron_mixcpt.config import Config
from megatron_mixcpt.evaluate.loading import quiet_libraries

KINDS = ("domain", "instruction", "preference", "preference", "general")  # by number of the kind
WITHOUT_ADAPTER = ("adapter_off", "cached", "deepspeed")  # teachers that are the base model alone


@dataclass
class Expected:
    """What a step should have given; fields as in observed.Step.

    Attributes:
        scores: of each router, the teacher's first, its logits of all tokens `[t, e]`.
    """

    losses: dict[int, Tensor] = field(default_factory=dict)
    teacher: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0
    scores: list[Tensor] = field(default_factory=list)


class Oracle:
    """The model of a Hugging Face directory in `dtype`.

    Args:
        config: of the run.
        start: directory of the weights that training started from, the teacher's or the reference's.
        adapter: directory of the adapter that training started from, or None.
    """

    def __init__(self, config: Config, start: Path, adapter: Path | None, dtype: torch.dtype) -> None:
        quiet_libraries()
        from transformers import AutoModelForCausalLM

        self.config, self.dtype = config, dtype
        self._model = AutoModelForCausalLM.from_pretrained(str(start), dtype=dtype, attn_implementation="eager").eval()
        self._model.requires_grad_(False)
        if hasattr(self._model, "set_experts_implementation"):  # transformers 5: one product an expert
            self._model.set_experts_implementation("eager")
        self._start = {name: tensor.to(dtype) for name, tensor in read_weights(start).items()}
        self.routers = Routers(self._model)
        self._adapter: dict[str, Tensor] | None = None
        self._adapter_start: dict[str, Tensor] | None = None
        if adapter is not None:
            self._adapter_start = {name: tensor.to(dtype) for name, tensor in read_adapter(adapter).items()}
            for name, module in self._model.named_modules():
                if isinstance(module, nn.Linear) and not is_expert(name):
                    module.register_forward_hook(self._beside(name))

    def step(
        self,
        weights: Mapping[str, Tensor],
        documents: list[Document],
        lengths: Mapping[int, int],
        choices: Mapping[int, Tensor],
        kd_factor: float = 1.0,
    ) -> Expected:
        """Losses and gradients of one step on `documents`.

        Args:
            weights: what is trained, by its name in Hugging Face's files.
            documents: those of padding count for routers alone.
            lengths: of each sample its row's tokens.
            choices: of each sample the teacher's first choice at each token, `[s]`; needed where a target is edited.
            kd_factor: on the configured weight of the distillation.
        """
        expected = Expected()
        trained = {name: weight.detach().to(self.dtype, copy=True).requires_grad_() for name, weight in weights.items()}
        tokens = _padded(documents)
        with torch.no_grad(), self._weights(self._start, self._of_teacher()):
            teacher = self._logits(tokens)
        expected.scores += self.routers.take(documents)
        base = {**self._start, **trained} if self._adapter_start is None else self._start
        with self._weights(base, trained if self._adapter_start is not None else None):
            student = self._logits(tokens)
            routed = self.routers.take(documents)
            if self.config.kind == "dpo":
                total = self._pairs(student, teacher, documents, expected)
            else:
                total = self._tokens(student, teacher, documents, lengths, choices, kd_factor, expected)
            if routed and self.config.train.router == "trained":
                total = total + self.routers.losses(routed, documents, self.config.train)
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        expected.scores += [logits.detach() for logits in routed]
        expected.gradients = {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(trained.items(), gradients)
        }
        squares = [gradient.double().square().sum() for gradient in expected.gradients.values()]
        expected.norm = float(torch.stack(squares).sum().sqrt())
        return expected

    def _of_teacher(self) -> dict[str, Tensor] | None:
        return None if self.config.teacher.source in WITHOUT_ADAPTER else self._adapter_start

    @contextlib.contextmanager
    def _weights(self, weights: Mapping[str, Tensor], adapter: dict[str, Tensor] | None) -> Iterator[None]:
        """The model with these weights, named as in files, as long as the context is open."""
        parameters = dict(self._model.named_parameters())
        if adapter is not None:
            weights = adapted_experts(weights, adapter, self._scale)
        weights = parameters_of(weights, parameters)
        owners = {name: self._model.get_submodule(name.rpartition(".")[0]) for name in parameters}
        tied = self._model.get_output_embeddings() if self._model.config.tie_word_embeddings else None
        for name, owner in owners.items():
            leaf = name.rpartition(".")[2]
            del owner._parameters[leaf]
            setattr(owner, leaf, weights[name])
            if tied is not None and name == "model.embed_tokens.weight":
                tied._parameters.pop("weight")
                tied.weight = weights[name]
        self._adapter = adapter
        try:
            yield
        finally:
            self._adapter = None
            for name, owner in owners.items():
                leaf = name.rpartition(".")[2]
                delattr(owner, leaf)
                owner.register_parameter(leaf, parameters[name])
            if tied is not None:
                delattr(tied, "weight")
                tied.register_parameter("weight", parameters["model.embed_tokens.weight"])

    def _logits(self, tokens: Tensor) -> Tensor:
        """`[d, l, v]`, fp64 of an fp64 model, else fp32. Nothing looks at what follows a document's end."""
        with _InDouble() if self.dtype == torch.float64 else contextlib.nullcontext():
            logits = self._model(input_ids=tokens, use_cache=False).logits
        return logits if self.dtype == torch.float64 else logits.float()

    def _tokens(
        self,
        student: Tensor,
        teacher: Tensor,
        documents: list[Document],
        lengths: Mapping[int, int],
        choices: Mapping[int, Tensor],
        kd_factor: float,
        expected: Expected,
    ) -> Tensor:
        """Sum of the tokens' losses over their number."""
        loss, distils = self.config.loss, self.config.uses_teacher
        kd_weight = 0.0 if loss.target == "none" else kd_factor * loss.kd_weight
        scale = 1.0 / (loss.ce_weight + kd_weight) if loss.normalize else 1.0
        total, count = student.new_zeros(()), 0
        for index, document in enumerate(documents):
            place = document.begin
            if document.is_padding:
                continue
            if distils:
                whole = expected.teacher.setdefault(
                    document.sample, teacher.new_full((lengths[document.sample], teacher.shape[-1]), torch.nan)
                )
                whole[place : place + len(document.tokens)] = self._told(teacher[index, : len(document.tokens)])
            row = expected.losses.setdefault(document.sample, student.new_zeros(lengths[document.sample]))
            follow = document.targets.nonzero().squeeze(1)  # tokens to predict; each by the one before it
            if len(follow) == 0:
                continue
            count += len(follow)
            labels, before = document.tokens[follow], follow - 1
            factors = torch.tensor([self._factors(int(kind)) for kind in document.kinds[follow]], dtype=student.dtype)
            values = scale * loss.ce_weight * factors[:, 0] * cross_entropy(student[index, before], labels)
            if distils:
                target = distillation_target(
                    teacher[index, before],
                    labels,
                    choices[document.sample][place + before],
                    target=loss.target,
                    temperature=loss.temperature,
                    margin=loss.margin,
                )
                log_q = torch.log_softmax(student[index, before] / loss.temperature, -1)
                values = values + scale * kd_weight * factors[:, 1] * divergence(target, log_q)
            row[place + before] = values.detach()
            total = total + values.sum()
        return total / max(count, 1)

    def _told(self, logits: Tensor) -> Tensor:
        """The teacher's logits as they can be observed: a cache keeps them up to a constant a token."""
        if self.config.teacher.source != "cached":
            return logits
        temperature = self.config.loss.temperature
        return temperature * torch.log_softmax(logits / temperature, -1)

    def _factors(self, kind: int) -> tuple[float, float]:
        factors = self.config.loss.by_kind.get(cast(Any, KINDS[kind]))
        return (factors.ce, factors.kd) if factors else (1.0, 1.0)

    def _pairs(self, student: Tensor, reference: Tensor, documents: list[Document], expected: Expected) -> Tensor:
        """Mean of the pairs' losses; documents 2i and 2i + 1 that are no padding are the answers of pair i."""
        align = self.config.align
        assert align is not None
        answers = [index for index, of in enumerate(documents) if not of.is_padding]
        student, reference = student[answers], reference[answers]
        documents = [documents[index] for index in answers]
        sums = [[self._answer(logits[i], of) for i, of in enumerate(documents)] for logits in (student, reference)]
        policy, before = (torch.stack(values).view(-1, 2) for values in sums)
        counts = torch.tensor([int(of.targets.sum()) for of in documents], dtype=student.dtype).view(-1, 2)
        losses = preference(
            policy,
            before,
            counts,
            loss=align.loss,
            beta=align.beta,
            smoothing=align.label_smoothing,
            per_token=align.length_normalized,
        )
        samples = torch.tensor([of.sample for of in documents[::2]])
        for sample in samples.unique().tolist():
            expected.losses[sample] = losses.detach()[samples == sample]
            expected.teacher[sample] = before.detach()[samples == sample]
        return losses.mean()

    @staticmethod
    def _answer(logits: Tensor, document: Document) -> Tensor:
        follow = document.targets.nonzero().squeeze(1)
        return -cross_entropy(logits[follow - 1], document.tokens[follow]).sum()

    @property
    def _scale(self) -> float:
        assert self.config.adapter is not None
        return self.config.adapter.alpha / self.config.adapter.rank

    def _beside(self, name: str) -> Callable[..., Tensor]:
        """What an adapter adds to the layer `name`: LoRA's alpha / r B A x; ALoRA's attention before B."""

        def hook(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            adapter, config = self._adapter, self.config.adapter
            if adapter is None or config is None:
                return output
            part = {key.removeprefix(f"{name}."): value for key, value in adapter.items() if key.startswith(f"{name}.")}
            if not part:
                return output
            if config.method == "lora":
                a, up = inputs[0] @ part["lora_A.weight"].T, part["lora_B.weight"]
            else:
                z, up = inputs[0] @ part["alora_A"].T, part["alora_B"]
                a = self._attended(z, part, config.num_heads) + (z if config.residual else 0.0)
            return output + self._scale * (a @ up.T)

        return hook

    def _attended(self, z: Tensor, part: Mapping[str, Tensor], heads: int) -> Tensor:
        """Causal attention over z `[d, l, r]`, within the model's sliding window."""
        d, length, rank = z.shape
        qkv = (z @ part["alora_attention_in"].T).view(d, length, 3, heads, rank // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [d, heads, l, r / heads]
        scores = query @ key.transpose(2, 3) / (rank // heads) ** 0.5
        ahead = torch.arange(length).unsqueeze(1) - torch.arange(length)  # of each query over each key
        window = self._model.config.to_dict().get("sliding_window") or length
        mixed = torch.softmax(scores.masked_fill((ahead < 0) | (ahead >= window), -torch.inf), -1) @ value
        return mixed.transpose(1, 2).reshape(d, length, rank) @ part["alora_attention_out"].T


class _InDouble(TorchFunctionMode):
    """transformers computes norms and softmax in fp32 whatever the model's dtype: in here fp32 is fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*(torch.float64 if argument is torch.float32 else argument for argument in args), **kwargs)


def _padded(documents: list[Document]) -> Tensor:
    """Tokens `[d, l]`: each document begins at the left."""
    return torch.nn.utils.rnn.pad_sequence([of.tokens for of in documents], batch_first=True)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face directory."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's directory by the layers' names: PEFT's for LoRA, ours for ALoRA."""
    return {name.removeprefix("base_model.model."): tensor for name, tensor in read_weights(folder).items()}
