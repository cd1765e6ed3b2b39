"""A recipe in torchtune's style: a class whose method computes the loss, weighted by the tokens of a step."""

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile

IGNORED, Batch = -100, dict[str, torch.Tensor]


class Recipe:
    """Sets up everything once, then trains."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes))
        # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
        self.model = gtcompile.compile_blocks(model, compiler="eager")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        loss_fn = lambda _, batch: self.loss_step(dict(batch))  # noqa: E731 # it takes the labels out
        self.adaptive = gtcompile.AdaptiveBackprop(self.model, self.optimizer, 0.5, loss_fn=loss_fn)

    def batches(self, count: int) -> list[Batch]:
        """Batches of four sequences that count upwards by 3; in one of them the last tokens are padding."""
        rows = (torch.randint(0, 256, (count, 4, 1)) + 3 * torch.arange(33)) % 256
        rows[:, 0, -8:] = IGNORED
        return [{"input_ids": each[:, :-1].clamp(min=0), "labels": each[:, 1:]} for each in rows]

    def loss_step(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a batch by token."""
        labels = batch.pop("labels")
        return cross_entropy(self.model(**batch).logits.flatten(0, 1), labels.flatten())

    def train(self) -> list[float]:
        """Train on two batches a step; returns the loss of the last batch of each epoch."""
        losses, tokens = [], 0
        for epoch in range(3):
            print(f"epoch {epoch}: {self.adaptive.reselect(self.batches(4))}")
            for number, batch in enumerate(self.batches(20)):
                tokens += (count := int((batch["labels"] != IGNORED).sum()))
                (loss := self.loss_step(batch)).mul(count).backward()
                if number % 2:
                    for gradient in [p.grad for p in self.model.parameters() if p.grad is not None]:
                        gradient /= tokens
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    tokens = 0
            losses.append(loss.item())
        return losses


def main() -> list[float]:
    """Train; returns the losses."""
    return Recipe().train()


if __name__ == "__main__":
    print(main())
