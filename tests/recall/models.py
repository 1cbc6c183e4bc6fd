"""A very small chat model with a byte-level tokenizer, which ends its turns now and then."""

from pathlib import Path

import torch

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_chat_model(folder: Path, *, template=TEMPLATE, end_logit=10.0, seed=0) -> Path:
    """Write model and tokenizer. `end_logit`: how much likelier than others a token that ends a turn or text is."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["The heron stands in the shallow water and waits for a slow fish. " * 3], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=CONTROLS[0], eos_token=CONTROLS[2])
    wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=2,
        initializer_range=0.3,  # logits far from uniform: differences must show
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # One channel is the same in every hidden state, so that the head can favour tokens everywhere.
        model.model.embed_tokens.weight[:, 0] = 1.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = -40.0  # bytes that are no character alone
        texts = [wrapped.decode([i]) for i in range(len(wrapped))]
        model.lm_head.weight[[i for i in range(3, len(texts)) if texts[i].isascii() and texts[i].isprintable()], 0] = 0
        model.lm_head.weight[2, 0] = end_logit
    model.save_pretrained(folder)
    return folder


def recall_values(folder: Path, model: Path, /, **changes) -> dict:
    """A small configuration; `changes` replace whole sections."""
    values = {
        "model": {"hf": str(model)},
        "out": str(folder / "out"),
        "n": {"instructions": 21, "text": 13},
        "engine": {"transformers": {"batch_size": 4, "block_size": 8, "dtype": "fp32"}},
        "sampling": {"max_instruction_tokens": 24, "max_answer_tokens": 16, "max_text_tokens": 16, "seed": 7},
        "filters": {"min_instruction_tokens": 1, "min_text_tokens": 1, "max_perplexity": 1e9, "max_repetition": 1.0},
    }
    return values | changes
