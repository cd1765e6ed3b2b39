"""A plain loop as accelerate's users write it, run by every process that `accelerate launch` starts.

`accelerate launch --multi_gpu --num_processes 2 -m tests.ranks.accelerate_run` starts several processes even
without a GPU.
"""

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object

import gtcompile
from tests.ranks.gloo_ranks import leave
from tests.support.models import Regression, make_batch


def main() -> None:
    """Train, and compare what the processes have."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[unused])
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    data = [{name: value[0] for name, value in make_batch(number).items()} for number in range(16)]
    loader = torch.utils.data.DataLoader(data, batch_size=2)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 0.7)
    inner, sets = accelerator.unwrap_model(model), []
    for _ in range(4):
        selection = adaptive.reselect(list(loader)[:2])
        sets.append(sorted(selection.trained))
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch))
                assert {n for n, p in inner.named_parameters() if p.grad is not None} == selection.trained
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    weights = torch.cat([parameter.detach().flatten() for parameter in inner.parameters()])
    first, *others = gather_object([(sets, weights)])
    assert all(sets == first[0] and torch.equal(weights, first[1]) for sets, weights in others)
    accelerator.print(f"{len(others) + 1} processes, {len(sets)} selections: the same sets and weights")
    accelerator.end_training()
    leave()


if __name__ == "__main__":
    main()
