"""A vision model compiled as a whole, with its loss outside of it: half of a full step's FLOPs."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gtcompile

Batch = tuple[torch.Tensor, torch.Tensor]


def make_model() -> nn.Sequential:
    """Three convolutions and a classifier of 10 classes for images of 3 x 16 x 16."""
    layers: list[nn.Module] = []
    for channels in [(3, 8), (8, 16), (16, 32)]:
        convolution = nn.Conv2d(*channels, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(channels[1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def make_batch() -> Batch:
    """Eight random images and their labels."""
    return torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))


def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The loss of one batch, a scalar."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def main() -> dict[str, frozenset[str]]:
    """Take a step with each of three trained sets; returns the parameters that had a gradient, for each."""
    torch.manual_seed(0)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    options = {"compiler": "eager", "variants": "hoisted"}
    model = torch.compile(make_model(), backend="gtcompile", options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(name: str) -> frozenset[str]:
        loss = loss_fn(model, make_batch())
        loss.backward()
        trained = frozenset(fqn for fqn, p in model._orig_mod.named_parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name}: loss {loss.item():.3f}, gradients of {len(trained)} parameters")
        return trained

    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, budget_fraction=0.5, loss_fn=loss_fn)
    print(adaptive.reselect([make_batch() for _ in range(4)]))
    trained = {"half the FLOPs": step("half the FLOPs")}
    for name, patterns in {"biases": ["*.bias"], "everything": None}.items():  # sets chosen by name
        gtcompile.train_only(model, patterns)
        trained[name] = step(name)
    return trained


if __name__ == "__main__":
    main()
