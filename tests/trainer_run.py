"""Trains with transformers.Trainer and the callback on every rank; prints what came of it.

`torchrun --nproc-per-node 2 -m tests.trainer_run FOLDER`
"""

import sys

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from gtcompile import AdaptiveBackpropCallback, trained_parameters
from tests.test_huggingface import make_args, make_data, make_model


class Watch(TrainerCallback):
    """Checks before each optimizer step that exactly the trained parameters have a gradient."""

    steps = 0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Compare."""
        model = kwargs["model"]
        gradients = {n for n, p in model.named_parameters() if p.grad is not None}
        assert gradients == trained_parameters(model), gradients ^ trained_parameters(model)
        self.steps += 1


def main(folder: str) -> None:
    """Train, and compare the weights of all ranks."""
    torch.set_num_threads(1)
    model, watch = make_model(), Watch()
    callback = AdaptiveBackpropCallback(0.6, compiler="eager", every=2, batches=2)
    trainer = Trainer(
        model=model,
        args=make_args(folder, num_train_epochs=2),
        train_dataset=make_data(),
        callbacks=[callback, watch],
    )
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    others = [torch.empty_like(weights) for _ in range(dist.get_world_size())]
    dist.all_gather(others, weights)
    assert all(torch.equal(weights, other) for other in others), "the ranks diverged"
    print(f"rank {dist.get_rank()}: {watch.steps} steps, {len(callback.adaptive.history)} selections")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
