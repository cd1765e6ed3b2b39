"""CUDA graphs of training steps: when they are possible, and the recorder that makes them."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gtcompile.state.shadow_optimizer import innermost


class CudaGraphs:
    """Records steps on one CUDA device.

    Ordinary steps run on the stream of the recordings: a recording fails if autograd waits for a stream on
    which an earlier step ran. torch records the state of the default random generator with the graph, so
    dropout draws new numbers at every replay.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Run on the stream of the recordings, after what was queued before and before what comes after."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the kernels of a step without running them; return a function that runs them."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            loss = step()

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


def check_recordable(model: nn.Module, optimizer: Optimizer, processes: int) -> None:
    """Refuse models and optimizers whose steps cannot be CUDA graphs.

    Args:
        model: with all parameters on one device.
        optimizer: or a wrapper with one in `.optimizer`.
        processes: that train the model together.

    Raises:
        ValueError: says what to change.
    """
    if processes > 1:
        raise ValueError(
            f"cuda_graphs=True works in one process, and {processes} train this model together: the sending "
            f"of gradients is not recorded"
        )
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type != "cuda":
        raise ValueError(
            f"CUDA graphs need a CUDA device, and the model is on {', '.join(sorted(map(str, devices)))}; "
            f"move all of it to one CUDA device first, or leave out cuda_graphs=True"
        )
    check_optimizer(innermost(optimizer), next(iter(devices)))


def check_optimizer(optimizer: Optimizer, device: torch.device) -> None:
    """Refuse an optimizer whose step reads numbers from the host that a recording would not see change.

    Raises:
        ValueError: says which argument to give.
    """
    kind = type(optimizer).__name__
    for group in optimizer.param_groups:
        if not group.get("capturable", isinstance(optimizer, SGD)):
            takes = "capturable" in group
            how = "pass capturable=True to it" if takes else "use AdamW(..., capturable=True)"
            raise ValueError(
                f"a CUDA graph needs an optimizer that counts its steps on the device, and this {kind} "
                f"counts on the host: {how}"
            )
        rate = group["lr"]
        if isinstance(rate, Tensor) and rate.device != device:
            raise ValueError(
                f"a CUDA graph reads a learning rate on {device}, and that of this {kind} is on "
                f"{rate.device}: pass lr=torch.tensor({float(rate):g}, device={str(device)!r})"
            )
