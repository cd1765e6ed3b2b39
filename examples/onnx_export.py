"""Export one training step as ONNX, and run it in ONNX Runtime without PyTorch in the loop."""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import nn


class Classifier(nn.Module):
    """Two layers; returns its loss when it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy, a scalar; `features` (rows, 8), `labels` (rows,)."""
        return nn.functional.cross_entropy(self.head(self.hidden(features).relu()), labels)


def make() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """What `module:function` on the command line calls: a model and a batch."""
    torch.manual_seed(0)
    return Classifier(), {"features": torch.randn(6, 8), "labels": torch.randint(0, 4, (6,))}


def main() -> dict[str, tuple[int, ...]]:
    """Export the gradients of the head alone; returns the shapes of what ONNX Runtime computes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "step.onnx"
        command = [sys.executable, "-m", "gtcompile", "export", "onnx_export:make", "--onnx", str(file)]
        subprocess.run([*command, "--train", "head.*"], check=True, cwd=Path(__file__).parent)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model, batch = make()
    values = {f"parameter.{name}": p.detach().numpy() for name, p in model.named_parameters()}
    values |= {f"batch.{name}": tensor.numpy() for name, tensor in batch.items()}
    wanted = {value.name for value in session.get_inputs()}
    outputs = session.run(None, {name: value for name, value in values.items() if name in wanted})
    shapes = {o.name: value.shape for o, value in zip(session.get_outputs(), outputs, strict=True)}
    print(shapes)
    return shapes


if __name__ == "__main__":
    main()
