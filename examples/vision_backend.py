"""A vision model compiled as a whole with `torch.compile`; a new trained set compiles nothing."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import gtcompile


def make_model() -> nn.Sequential:
    """Three convolutions and a classifier of 10 classes for images of 3 x 16 x 16."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in [(3, 8), (8, 16), (16, 32)]:
        layers += [
            nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> dict[str, frozenset[str]]:
    """Take a step with each of three trained sets; returns which parameters had a gradient."""
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    # gtcompile registers itself with torch, so this line alone needs no import of it.
    options = {"compiler": "eager", "variants": "hoisted"}
    model = torch.compile(make_model(), backend="gtcompile", options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = {}
    for name, patterns in {"classifier": ["11.*"], "biases": ["*.bias"], "everything": None}.items():
        gtcompile.train_only(model, patterns)
        loss = cross_entropy(model(images), labels)
        loss.backward()
        trained[name] = frozenset(fqn for fqn, p in model._orig_mod.named_parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        print(f"{name}: loss {loss.item():.3f}, gradients of {len(trained[name])} parameters")
    return trained


if __name__ == "__main__":
    main()
