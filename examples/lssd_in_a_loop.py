"""Mix-CPT's loss in a plain PyTorch loop: a small model learns new text, with and without its former self as teacher.

python examples/lssd_in_a_loop.py
"""

import copy

import torch
from torch import Tensor, nn

from megatron_mixcpt.kernels import lssd_loss

VOCABULARY, CONTEXT = 64, 4


class Model(nn.Module):
    """Predicts each token from the CONTEXT before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.hidden = nn.Linear(CONTEXT * 32, 128)
        self.head = nn.Linear(128, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, s - CONTEXT, v] of tokens [b, s]: those of position i are for token i + CONTEXT."""
        windows = tokens[:, :-1].unfold(1, CONTEXT, 1)  # [b, s - CONTEXT, CONTEXT]
        return self.head(torch.tanh(self.hidden(self.embed(windows).flatten(2))))


def texts(seed: int, words: range) -> Tensor:
    """Random texts [32, 24] in a language of its own: most of its words are followed by one certain other."""
    generator = torch.Generator().manual_seed(seed)
    follower = torch.tensor(words)[torch.randint(len(words), (VOCABULARY,), generator=generator)]
    tokens = [torch.randint(words.start, words.stop, (32,), generator=generator)]
    for _ in range(23):
        chance = torch.randint(words.start, words.stop, (32,), generator=generator)
        tokens.append(torch.where(torch.rand(32, generator=generator) < 0.8, follower[tokens[-1]], chance))
    return torch.stack(tokens, 1)


def fit(model: Model, tokens: Tensor, teacher: Model | None, steps: int = 100) -> Model:
    """Train on `tokens`; with a teacher, also towards its distribution, the label put where its favourite was."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        with torch.no_grad():
            taught = None if teacher is None else teacher(tokens)
        loss = lssd_loss(model(tokens), taught, tokens[:, CONTEXT:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def cross_entropy(model: Model, tokens: Tensor) -> float:
    return lssd_loss(model(tokens), None, tokens[:, CONTEXT:]).mean().item()


def main() -> dict[str, tuple[float, float]]:
    torch.manual_seed(0)
    general, domain = texts(1, range(VOCABULARY)), texts(2, range(16))
    base = fit(Model(), general, None, steps=200)
    teacher = copy.deepcopy(base)
    models = {
        "before": base,
        "cross entropy": fit(copy.deepcopy(base), domain, None),
        "with LSSD": fit(copy.deepcopy(base), domain, teacher),
    }
    found = {name: (cross_entropy(model, domain), cross_entropy(model, general)) for name, model in models.items()}
    print(f"{'cross entropy of':15} {'domain':>8} {'general':>8}")
    for name, (learned, kept) in found.items():
        print(f"{name:15} {learned:8.3f} {kept:8.3f}")
    return found


if __name__ == "__main__":
    main()
