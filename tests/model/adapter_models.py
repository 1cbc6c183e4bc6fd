"""Models with adapters that do something, and a plain rewriting of what an adapter computes."""

import torch

from megatron_mixcpt.config import AdapterConfig
from megatron_mixcpt.huggingface.config import architecture_from_hf
from megatron_mixcpt.runtime.parallel import parallel_context
from tests.model.grid import cross_entropy

TOKENS = torch.randint(3, 301, (2, 13), generator=torch.Generator().manual_seed(5))
METHODS = {
    "lora": AdapterConfig(method="lora", rank=6, alpha=9.0),
    "alora": AdapterConfig(method="alora", rank=8, alpha=12.0, heads=2),
    "alora without residual": AdapterConfig(method="alora", rank=6, alpha=9.0, heads=3, residual=False),
    "lora on some": AdapterConfig(method="lora", rank=4, targets=["q_proj", "v_proj", "model.layers.1.mlp.up_proj"]),
    "alora on some": AdapterConfig(method="alora", rank=4, targets=["k_proj", "gate_proj", "down_proj"]),
}

OF_MIXTURES = {
    "lora": METHODS["lora"],
    "lora, Mixtral's names": AdapterConfig(method="lora", rank=4, targets=["q_proj", "w1", "w2", "w3"]),
    "lora on a dense layer": AdapterConfig(method="lora", rank=4, targets=["o_proj", "model.layers.1.mlp.*"]),
    "lora on some experts": AdapterConfig(method="lora", rank=4, targets=["model.layers.2.mlp.experts.*"]),
}


def random_tensors(arch, adapter, seed=3, scale=0.2):
    """Whole tensors by key, none of them zero."""
    from megatron_mixcpt.adapters.layout import adapted_linears

    generator = torch.Generator().manual_seed(seed)
    return {
        linear.key(name): scale * torch.randn(shape, generator=generator)
        for linear in adapted_linears(arch, adapter)
        for name, (shape, _) in linear.tensors().items()
    }


def fill(model, tensors):
    for adapter in model.adapters():
        for name in adapter.layout.tensors():
            adapter.fill(name, tensors[adapter.layout.key(name)])


def our_logits(hf_dir, adapter, tensors, tokens=TOKENS):
    with parallel_context():
        from megatron_mixcpt.attention.documents import Documents
        from megatron_mixcpt.model.build import build_gpt
        from megatron_mixcpt.model.load import load_hf

        model = build_gpt(architecture_from_hf(hf_dir), seed=None, adapter=adapter)
        load_hf(model, hf_dir)
        fill(model, tensors)
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
        with torch.no_grad():
            return model(tokens, positions, Documents.whole(*tokens.shape))[..., : model.arch.vocab_size]


def build(arch, adapter=None, tensors=None, **options):
    """A model, within `parallel_context`, whose adapters hold `tensors`, else their starting values."""
    from megatron_mixcpt.model.build import build_gpt

    model = build_gpt(arch, adapter=adapter, **options)
    for module in model.adapters():
        module.initialize(1)
    if tensors is not None:
        fill(model, tensors)
    model.loss = cross_entropy(model)
    return model


def adapted_output(linear, tensors, weight, x, doc_start):
    """The whole layer's output in fp64, token by token: x `[s, in]` of one row, doc_start `[s]` -> `[s, out]`."""
    config = linear.config
    get = {name: tensors[linear.key(name)].double() for name in linear.tensors()}
    down = get["down"].view(len(linear.targets), config.rank, -1)
    up = get["up"].flatten(0, -2)
    owners = linear.row_targets()
    result = x.double() @ weight.double().T
    for index in range(len(linear.targets)):
        z = x.double() @ down[index].T  # [s, r]
        a = z
        if config.method == "alora":
            query, key, value = (z @ get["attention_in"][index].T).chunk(3, dim=1)
            width = config.rank // config.num_heads
            mixed = torch.zeros_like(z)
            begin = 0
            for token in range(len(x)):
                begin = token if doc_start[token] else begin
                for head in range(config.num_heads):
                    columns = slice(head * width, (head + 1) * width)
                    scores = key[begin : token + 1, columns] @ query[token, columns] / width**0.5
                    mixed[token, columns] = torch.softmax(scores, 0) @ value[begin : token + 1, columns]
            a = mixed @ get["attention_out"][index].T
            if config.residual:
                a = a + z
        adapted = owners[owners >= 0]
        result[:, owners == index] += config.alpha / config.rank * (a @ up[adapted == index].T)
    return result
