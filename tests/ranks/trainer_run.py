"""Trains with transformers.Trainer and the callback on every rank; leaves what came of it in the folder.

`torchrun --nproc-per-node 2 -m tests.ranks.trainer_run replicated|sharded FOLDER`
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainerCallback

from gtcompile import AdaptiveBackpropCallback, trained_parameters
from tests.ranks.gloo_ranks import leave
from tests.support.trainer import adaptive, losses, make_args, make_data, make_model


class Watch(TrainerCallback):
    """Checks before each optimizer step that exactly the trained parameters have a gradient."""

    def __init__(self):
        self.sets = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Compare."""
        model = kwargs["model"]
        gradients = {n for n, p in model.named_parameters() if p.grad is not None}
        assert gradients == trained_parameters(model), gradients ^ trained_parameters(model)
        self.sets.append(gradients)


def shard(trainer: Trainer) -> None:
    """Have accelerate shard with FSDP2, which it offers on accelerators alone; the code is the same."""
    state = trainer.accelerator.state
    state._shared_state["distributed_type"] = DistributedType.FSDP
    state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )
    trainer.is_fsdp_enabled = True


def train(
    case: str, folder: Path, callback: AdaptiveBackpropCallback, dropout: float = 0, resume: str | None = None
) -> dict[str, object]:
    """Sets, losses and weights of two epochs, six steps each; checked to be the same on all ranks."""
    watch, data = Watch(), make_data()
    settings = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 5}
    trainer = Trainer(
        model=make_model(dropout),
        args=make_args(folder, num_train_epochs=2, **settings),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[callback, watch],
    )
    if case == "sharded":
        shard(trainer)
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: p.full_tensor() if case == "sharded" else p for n, p in trainer.model.state_dict().items()}
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others), "the ranks diverged"
    return {"sets": watch.sets, "losses": losses(trainer), "weights": weights}


def assert_continued(case: str, folder: Path) -> None:
    """A training that went on from a checkpoint equals one that never stopped, bit for bit."""
    whole = train(case, folder, adaptive(every=2, frozen_state="drop"), dropout=0.1)
    checkpoint = str(folder / "checkpoint-5")
    again = train(case, folder, adaptive(every=2, frozen_state="drop"), dropout=0.1, resume=checkpoint)
    assert again["losses"] == whole["losses"]
    assert again["sets"] == whole["sets"][5:]
    torch.testing.assert_close(again["weights"], whole["weights"], rtol=0, atol=0)


def main(case: str, folder: Path) -> None:
    """Train, go on from the middle, and keep what the first training came to."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Detected an existing checkpoint")
    outcome = train(case, folder / "once", adaptive(every=2))
    assert_continued(case, folder / "twice")
    if dist.get_rank() == 0:
        torch.save(outcome, folder / "outcome")
    leave()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
