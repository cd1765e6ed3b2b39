"""A LightningModule with the callback: one argument of the Trainer more than without."""

import lightning.pytorch as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import gtcompile.lightning


class Classifier(pl.LightningModule):
    """Tells sequences of small tokens from sequences of large ones."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        self.model = BertForSequenceClassification(BertConfig(vocab_size=64, **sizes))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss, computed outside of the model."""
        tokens, labels = batch
        loss = cross_entropy(self.model(tokens).logits, labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """The share of right answers."""
        tokens, labels = batch
        self.log("accuracy", (self.model(tokens).logits.argmax(-1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all parameters, whichever are trained first."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def make_loader(rows: int, shuffle: bool = False) -> DataLoader:
    """Sequences of 16 tokens, half of them from the lower half of the vocabulary."""
    labels = torch.arange(rows) % 2
    tokens = torch.randint(0, 32, (rows, 16)) + 32 * labels[:, None]
    return DataLoader(list(zip(tokens, labels, strict=True)), batch_size=8, shuffle=shuffle)


def main() -> float:
    """Train for two epochs at half of the FLOPs; returns the accuracy."""
    torch.manual_seed(0)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    callback = gtcompile.lightning.AdaptiveBackpropCallback(0.5, compiler="eager")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(Classifier(), make_loader(160, shuffle=True), make_loader(32))
    for selection in callback.adaptive.history:
        print(selection)
    return trainer.callback_metrics["accuracy"].item()


if __name__ == "__main__":
    main()
