"""A step of transformers' own model on the shapes of training.py: cross-entropy, bf16 throughout, fused AdamW.

Weights, gradients and moments are bf16 there, while the trainer keeps gradients, moments and master weights in fp32:
its optimizer moves several times the bytes, which is why the halves of the step are told apart. One document fills the
row, for which transformers has its fastest attention; FlexAttention stands for packed documents.
"""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from typing import Any

import torch
import transformers

from benchmarks.gpu import workload
from benchmarks.gpu.findings import Findings, LeftOut, reason
from benchmarks.gpu.training import Case
from megatron_mixcpt.architecture.architecture import Architecture
from megatron_mixcpt.huggingface.config import config_dict

PLAIN, COMPILED, PACKED = "transformers", "transformers, compiled", "transformers, FlexAttention, compiled"


def run(findings: Findings, *, small: bool) -> None:
    models = workload.SMALL_MODELS if small else workload.MODELS
    lengths = workload.SMALL_TOKENS if small else workload.TOKENS
    packed = workload.SMALL_PACKED if small else workload.PACKED
    kinds = [PLAIN] if small else [PLAIN, COMPILED, PACKED]
    cases = [
        Case(model, tokens, packed if kind == PACKED else tokens, kind)
        for kind in kinds
        for tokens in lengths
        for model in reversed(models)
    ]
    findings.plan(*(case.name for case in cases))
    for case in cases:
        with findings.tried(case.name) as values:
            arch = models[case.model]
            attention = _attention(case)
            try:
                step, optimize = _step(arch, case, attention)
                values |= workload.measured(arch, case.tokens, case.document, step, optimize, small=small)
            except Exception as error:  # a peer's failure is a result
                traceback.print_exc()
                raise LeftOut(reason(error)) from None
            values["told"] = attention
        step = optimize = None
        workload.free()
        torch.compiler.reset()


def _attention(case: Case) -> str:
    if case.loss == PACKED:
        return "flex_attention"
    installed = importlib.util.find_spec("flash_attn") is not None and workload.device().type == "cuda"
    return "flash_attention_2" if installed else "sdpa"


def _step(arch: Architecture, case: Case, attention: str) -> tuple[Callable[[], object], Callable[[], object]]:
    device = workload.device()
    config = transformers.AutoConfig.for_model(**config_dict(arch))
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = workload.batch(arch, case.tokens, case.document)
    tokens, positions = batch.tokens.to(device), batch.position_ids.to(device)
    if case.loss != PLAIN:
        for layer in model.model.layers:  # which are alike and compiled once
            layer.compile()
    loss = torch.compile(_loss) if case.loss != PLAIN else _loss
    options: dict[str, Any] = {"position_ids": positions} if case.loss == PACKED else {}

    def forward_backward() -> None:
        optimizer.zero_grad(set_to_none=True)
        hidden = model.model(input_ids=tokens, use_cache=False, **options).last_hidden_state
        loss(hidden, model.lm_head.weight, tokens).backward()

    return forward_backward, optimizer.step


def _loss(hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next tokens, in fp32 as transformers computes it."""
    logits = (hidden[:, :-1] @ head.t()).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
