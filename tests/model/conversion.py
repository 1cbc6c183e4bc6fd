"""Hugging Face directories through our model: there and back, and what it computes."""

import torch

from megatron_mixcpt.runtime.parallel import parallel_context
from tests.helpers.exporting import export_model


def round_trip(source, out, tensor, pipeline, dtype, expert=1):
    with parallel_context(tensor=tensor, pipeline=pipeline, expert=expert):
        from megatron_mixcpt.huggingface.config import architecture_from_hf
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        model = build_gpt(architecture_from_hf(source), params_dtype=dtype, seed=None)
        load_hf(model, source)
        export_model(model, out, source)


def tokens_of(model, rows=2, length=20):
    return torch.randint(model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))


def our_logits(source, tokens, doc_start):
    with parallel_context():
        from megatron_mixcpt.attention.documents import Documents
        from megatron_mixcpt.huggingface.config import architecture_from_hf
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        arch = architecture_from_hf(source)
        model = build_gpt(arch, seed=None)
        load_hf(model, source)
        packing = Documents.of(doc_start)
        with torch.no_grad():
            logits = model(tokens, packing.position_ids(), packing)
            hidden = model.hidden(tokens, packing.position_ids(), packing)
            torch.testing.assert_close(model.output_logits(hidden).transpose(0, 1), logits)
        assert logits[..., arch.vocab_size :].eq(0).all()  # padding rows
        return logits[..., : arch.vocab_size]
