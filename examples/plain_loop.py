"""A training loop of your own: half of a full step's FLOPs, a new set of parameters every epoch."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile


def make_model() -> LlamaForCausalLM:
    """Six blocks of width 64, random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def make_batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Batches of 4 sequences that count upwards by 3, so that there is something to learn."""
    starts = torch.randint(0, 256, (count, 4, 1))
    tokens = (starts + 3 * torch.arange(32)) % 256
    return [{"input_ids": rows, "labels": rows} for rows in tokens]


def main() -> list[float]:
    """Train for three epochs; returns the loss of the last batch of each."""
    torch.manual_seed(0)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    model = gtcompile.compile_blocks(make_model(), compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, budget_fraction=0.5)
    losses = []
    for epoch in range(3):
        selection = adaptive.reselect(make_batches(4))
        for batch in make_batches(20):
            loss = model(**batch).loss
            loss.backward()  # parameters that are not selected have no gradient
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, {selection}")
    return losses


if __name__ == "__main__":
    main()
