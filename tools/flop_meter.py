"""Count the FLOPs that a compiled training step really executes, operator by operator."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

import gtcompile.flops  # noqa: F401 - registers the formulas torch lacks
from gtcompile.backend import gtcompile as gtcompile_backend
from gtcompile.capture import loss_of
from gtcompile.errors import GTCompileError
from gtcompile.restoration import restored


class FlopMeter:
    """A model compiled by gtcompile with the eager compiler, whose steps can be counted.

    `FlopCounterMode` cannot see into Inductor's kernels, and around a whole compiled call it makes Dynamo
    step aside. So the counter is switched on inside the region's forward, and around the backward: what is
    counted is the rewritten graph of the variant in use.

    Args:
        model: not compiled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._counter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        compiled = torch.compile(model, backend=self._backend, dynamic=False)
        self.compiled: nn.Module = compiled  # type: ignore[assignment]
        """The compiled model; it may be trained as well."""

    def count(self, batch: Mapping[str, Any]) -> int:
        """FLOPs of one forward and backward with what is trained now; nothing changes."""
        forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
        with restored(self._model):
            loss_of(self.compiled(**batch)).backward()  # builds the variant, which is not part of a step
            with self._counting(forward):
                loss = loss_of(self.compiled(**batch))
            with backward:
                loss.backward()
        return int(forward.get_total_flops() + backward.get_total_flops())

    def check(self, batch: Mapping[str, Any], predicted: int) -> int:
        """Count one step and compare.

        Raises:
            GTCompileError: the prediction is not exact.
        """
        counted = self.count(batch)
        if counted != predicted:
            raise GTCompileError(
                f"a training step executes {counted} FLOPs where {predicted} were predicted. The costs do "
                f"not describe this model, so no budget would hold; a graph break may be the reason."
            )
        return counted

    def _backend(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        region = gtcompile_backend(graph, example_inputs, options={"compiler": "eager"})

        def counted(*inputs: Any) -> Any:
            with self._counter:
                return region(*inputs)

        return torch.compiler.disable(counted)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _counting(self, counter: FlopCounterMode) -> Iterator[None]:
        self._counter = counter
        try:
            yield
        finally:
            self._counter = contextlib.nullcontext()
