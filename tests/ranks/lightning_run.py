"""Trains with Lightning's Trainer and the callback on every rank; leaves what came of it in the folder.

`torchrun --nproc-per-node 2 -m tests.ranks.lightning_run FOLDER`
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from gtcompile import trained_parameters
from tests.ranks.gloo_ranks import leave
from tests.support.lightning import Witness, adaptive, fit


def train(folder: Path, *callbacks: object, resume: Path | None = None) -> dict[str, object]:
    """Sets, batches of all ranks, and weights, which must be the same on all; two epochs of three steps."""
    witness = Witness()
    settings = {"devices": 2, "strategy": "ddp_find_unused_parameters_true", "max_epochs": 2}
    settings |= {"accumulate_grad_batches": 2, "enable_checkpointing": True}
    module, _ = fit(folder, adaptive(every=2), witness, *callbacks, resume=resume, **settings)
    for trained, gradients in witness.steps:
        assert trained == gradients.keys(), trained ^ gradients.keys()
    assert trained_parameters(module) == dict(module.named_parameters()).keys()
    flat = torch.cat([weight.flatten() for weight in module.state_dict().values()])
    others = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(others, flat)
    assert all(torch.equal(flat, other) for other in others), "the ranks diverged"
    batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in others]
    dist.all_gather_object(batches, witness.batches)
    together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*batches, strict=True)]
    sets = [trained for trained, _ in witness.steps]
    return {"sets": sets, "batches": together, "weights": module.state_dict()}


def main(folder: Path) -> None:
    """Train, continue from the end of the first epoch, and keep what the first training came to."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    saver = ModelCheckpoint(folder / "saved", "{step}", every_n_epochs=1, save_top_k=-1)
    outcome = train(folder, saver)
    again = train(folder, resume=folder / "saved" / "step=3.ckpt")
    assert again["sets"] == outcome["sets"][3:]
    torch.testing.assert_close(again["weights"], outcome["weights"], rtol=0, atol=0)
    if dist.get_rank() == 0:
        torch.save(outcome, folder / "outcome")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
