"""A loop in nanoGPT's style, with batches of two tensors and a model that returns `(logits, loss)`."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gtcompile

VOCABULARY, WIDTH, LENGTH, Pair = 64, 32, 32, tuple[torch.Tensor, torch.Tensor]


class GPT(nn.Module):
    """Four blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        block = {"nhead": 4, "dim_feedforward": 128, "dropout": 0.0, "batch_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(WIDTH, **block) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> Pair:
        """Logits first and the loss second."""
        x = self.tokens(tokens) + self.positions(torch.arange(LENGTH))
        for block in self.blocks:
            x = block(x, nn.Transformer.generate_square_subsequent_mask(LENGTH), is_causal=True)
        logits = self.head(x)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_batches(count: int) -> list[Pair]:
    """Batches of four sequences that count upwards by 3, with the next token of each position."""
    rows = (torch.randint(0, VOCABULARY, (count, 4, 1)) + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
    return [(batch[:, :-1], batch[:, 1:]) for batch in rows]


def main() -> list[float]:
    """Train with accumulation over two batches; returns the loss of the last batch of each epoch."""
    torch.manual_seed(0)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    model = gtcompile.compile_blocks(GPT(), compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loss_fn = lambda model, batch: model(*batch)[1]  # noqa: E731 # how to call the model, where its loss is
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, budget_fraction=0.5, loss_fn=loss_fn)
    losses = []
    for epoch in range(3):
        print(f"epoch {epoch}: {adaptive.reselect(make_batches(4))}")
        for number, (tokens, targets) in enumerate(make_batches(20)):
            _, loss = model(tokens, targets)
            (loss / 2).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    print(losses)
    return losses


if __name__ == "__main__":
    main()
