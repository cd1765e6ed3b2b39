"""Compile a model block by block: repeated blocks share one capture and one compilation."""

import inspect
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from gtcompile.capture.model_io import unwrap
from gtcompile.capture.pristine_model import compiled_forward, uncompile_block, uses_compiled_code
from gtcompile.compiler.backend import make_backend
from gtcompile.compiler.boundaries import (
    Calibration,
    boundary,
    needs_gradient,
    unwatch_embeddings,
    watch_embeddings,
)
from gtcompile.compiler.options import parse_options
from gtcompile.compiler.self_test import check_contracts
from gtcompile.errors import CaptureError
from gtcompile.graph.names import near_names, refuse_string
from gtcompile.state import trained_set
from gtcompile.torch_internals import compiled_code_is_off, dynamo_config

logger = logging.getLogger(__name__)
Backend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
BLOCK_DEFAULTS = {"variants": "hoisted", "cut_chains": "run"}
"""Defaults of `compile_blocks` that differ from `CompileOptions`: a new trained set compiles nothing."""
CAPTURES = 64
"""How often Dynamo may capture blocks of one class. More is an error: something differs at every call."""
_MORE = 4 * CAPTURES
"""Dynamo's own limit. Beyond it Dynamo silently runs eagerly, so our limit must be reached first."""
_TAKES_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters
"""Whether `torch.compile` takes the limit as an argument, since 2.13."""


def compile_blocks(model: nn.Module, *, blocks: Iterable[str] | None = None, **options: Any) -> nn.Module:
    """Make each repeated block of `model` a compiled region of its own.

    Blocks run compiled while gradients are enabled, and eagerly otherwise: evaluation and generation compile
    nothing. The rest of the model (embeddings, final norm, head, loss) is left eager, where `train_only`
    freezes by `requires_grad_`.

    Args:
        model: any module; changed in place, `uncompile_blocks` undoes it.
        blocks: FQNs of the modules to compile, instead of those `find_blocks` finds.
        **options: fields of `CompileOptions`, by default `variants="hoisted"`, `cut_chains="run"`.

    Returns:
        The same model.

    Raises:
        ValueError: there is no repeated block, a name in `blocks` is not a module, the model is compiled
            already, or an option or its value is unknown.
        TypeError: `blocks` is a single string.
        GraphContractError: this torch fails the self-test.
    """
    model = unwrap(model)
    parsed = parse_options(BLOCK_DEFAULTS | options)
    check_contracts()  # here rather than in the backend, so that an error is not wrapped by Dynamo's
    if uses_compiled_code(model):
        raise ValueError("the model is compiled already; uncompile_blocks(model) undoes compile_blocks")
    refuse_string(blocks)
    names = tuple(find_blocks(model) if blocks is None else blocks)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks; name them with blocks=[...], "
            f'or compile the model as a whole: torch.compile(model, backend="gtcompile")'
        )
    modules = [_submodule(model, name) for name in names]
    calibration = Calibration(model, modules)
    kinds: dict[type[nn.Module], Kind] = {}
    own_code = {type(block): CodeCopies() for block in modules}
    for block in modules:
        kind = kinds.setdefault(type(block), Kind(type(block), make_backend(parsed)))
        compiled = _compile(own_code[type(block)].of(block.forward), kind)
        block.forward = BlockForward(block, compiled, kind, calibration)
    inside = set(chain.from_iterable(block.parameters() for block in modules))
    trained_set.expect_region(inside)
    trained_set.leave_to_eager(p for p in model.parameters() if p not in inside)
    watch_embeddings(model)
    return model


def _compile(forward: Callable[..., Any], kind: "Kind") -> Callable[..., Any]:
    """Compile a forward that Dynamo may capture as often as our own limit allows."""
    if _TAKES_LIMIT:
        compiled: Any = torch.compile(forward, backend=kind, recompile_limit=_MORE)  # type: ignore[call-overload, unused-ignore]
        return cast("Callable[..., Any]", compiled)
    captured = torch.compile(forward, backend=kind)

    def call(*args: Any, **kwargs: Any) -> Any:
        before = dynamo_config.recompile_limit  # set by hand: `dynamo_config.patch` takes ten times as long
        dynamo_config.recompile_limit = _MORE
        try:
            return captured(*args, **kwargs)
        finally:
            dynamo_config.recompile_limit = before

    return call


class CodeCopies:
    """Copies of methods. Methods with the same function share one new code object.

    Dynamo keeps compiled code, and counts recompilations, by code object. All blocks of transformers run one
    wrapper function around their forward. Without copies, another compiled model in the process would use up
    the recompile limit of this one, and the blocks of this one would silently run eagerly.
    """

    def __init__(self) -> None:
        self._copies: dict[FunctionType, FunctionType] = {}

    def of(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return the method with its function replaced by a copy; other callables are returned unchanged."""
        if not isinstance(method, MethodType) or not isinstance(method.__func__, FunctionType):
            return method
        function = method.__func__
        if function not in self._copies:
            self._copies[function] = _copy_function(function)
        return MethodType(self._copies[function], method.__self__)


def _copy_function(function: FunctionType) -> FunctionType:
    code = function.__code__.replace()
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__qualname__ = function.__kwdefaults__, function.__qualname__
    vars(made).update(vars(function))
    return made


class Kind:
    """State that the compiled blocks of one class share.

    Args:
        block_class: their class.
        backend: compiles the graphs that Dynamo captures.
    """

    def __init__(self, block_class: type[nn.Module], backend: Backend) -> None:
        self.differentiable: set[int | str] = set()
        """Inputs, by position or name, that required grad in any call so far."""
        self._class, self._backend = block_class, backend
        self.__name__ = "gtcompile"  # what Dynamo calls this backend in the errors it raises
        self._captures, self._calls = 0, 0
        self._eager = weakref.WeakSet[nn.Module]()

    def __call__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph that Dynamo captured.

        Raises:
            CaptureError: Dynamo captures again and again.
        """
        self._captures += 1
        if self._captures > CAPTURES:
            raise CaptureError(
                f"Dynamo captured {self._class.__name__} {CAPTURES} times and needs to again: something is "
                f'different at every call, often a shape or a number. TORCH_LOGS="recompiles" shows it.'
            )
        return self._backend(graph, example_inputs)

    @property
    def runs_eagerly(self) -> bool:
        """Whether these blocks have run without Dynamo capturing anything."""
        return not self._captures and self._calls > 0

    def called(self, block: nn.Module) -> None:
        """Note that a block has run. If Dynamo skipped it, eager code computes its gradients."""
        self._calls += 1
        if not self.runs_eagerly:
            return
        if self._calls == 1:
            logger.warning(
                "%s runs eagerly: Dynamo captured nothing of it, often for a branch on data in a loop "
                "(TORCH_LOGS=graph_breaks). Gradients and FLOPs are as planned, only nothing is faster.",
                self._class.__name__,
            )
        if block not in self._eager:
            self._eager.add(block)
            trained_set.leave_to_eager(block.parameters())


def uncompile_blocks(model: nn.Module) -> nn.Module:
    """Undo `compile_blocks`: the model runs eagerly again, with the same parameters trained."""
    model = unwrap(model)
    for module in model.modules():
        if forward := compiled_forward(module):
            forward.calibration.remove_hooks()
            uncompile_block(module)
    unwatch_embeddings(model)
    chosen = trained_set.trained_parameters(model)
    trained_set.enter_eager(model.parameters())
    if chosen:
        trained_set.set_trained(model, chosen)
    return model


def find_blocks(model: nn.Module) -> Iterator[str]:
    """Find the repeated blocks: sibling modules of one class that have parameters and submodules.

    The linear layers of a multi-layer perceptron are no blocks, because they have no submodules. The experts
    inside a transformer block belong to that block, because only outermost blocks are found.

    Yields:
        The FQN of each block, in the order of registration.
    """
    yield from _blocks_below(model, "")


def _blocks_below(module: nn.Module, prefix: str) -> Iterator[str]:
    members = {name: child for name, child in module.named_children() if _could_be_block(child)}
    repeated = {kind for kind, count in Counter(map(type, members.values())).items() if count > 1}
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and bool(repeated)
    for name, child in module.named_children():
        fqn = f"{prefix}{name}"
        if name in members and (is_list or type(child) in repeated) and not _is_stack(child, in_list=is_list):
            yield fqn
        else:
            yield from _blocks_below(child, f"{fqn}.")


def _could_be_block(module: nn.Module) -> bool:
    has_children = any(True for _ in module.children())
    return has_children and not isinstance(module, nn.ModuleList) and any(True for _ in module.parameters())


def _is_stack(module: nn.Module, *, in_list: bool) -> bool:
    """Whether a module holds a list of repeated blocks, as an encoder or a decoder does.

    A member of a list may be a stage of blocks, or a block with a list of experts. The difference: experts
    have only leaf modules as children, whereas blocks have children with modules of their own.
    """
    lists = [m for m in module.children() if isinstance(m, nn.ModuleList)]
    return any(_is_list_of_blocks(members, nested=in_list) for members in lists)


def _is_list_of_blocks(members: nn.ModuleList, *, nested: bool) -> bool:
    kinds = Counter(map(type, members))
    for kind in (kind for kind, count in kinds.items() if count > 1):
        blocks = [m for m in members if type(m) is kind]
        if all(map(_could_be_block, blocks)) and (not nested or any(map(_is_nested, blocks))):
            return True
    return False


def _is_nested(module: nn.Module) -> bool:
    return any(True for child in module.children() for _ in child.children())


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        near = near_names(name, [n for n, _ in model.named_modules() if n])
        raise ValueError(f"blocks: {type(model).__name__} has no module {name!r}; {near}") from None


class BlockForward:
    """A block's forward: compiled while gradients are enabled, eager otherwise.

    Dynamo guards on the `requires_grad` of every input. So that no guard fails, an input that required grad
    in an earlier call is replaced by an autograd boundary, which requires grad, where only frozen parameters
    are upstream of it (`boundaries.py`).

    Copies of the block, deep or pickled, have the eager forward, because compiled code is bound to the
    parameters of this block.
    """

    def __init__(
        self,
        block: nn.Module,
        compiled: Callable[..., Any],
        kind: Kind,
        calibration: Calibration,
    ) -> None:
        self.eager = block.forward
        self.compiled = compiled
        self.calibration = calibration
        self.retired = False
        """Set by `uncompile_block` if another wrapper still calls this forward: it runs eagerly then."""
        self._block = block
        self._kind = kind
        self._decided: dict[int | str, bool] = {}
        self._generation = -1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if self.retired or not torch.is_grad_enabled() or compiled_code_is_off():
            return self.eager(*args, **kwargs)
        steady = [self._steady(i, arg) if isinstance(arg, Tensor) else arg for i, arg in enumerate(args)]
        for name, value in kwargs.items():  # the dictionary is ours: Python makes one for every call
            if isinstance(value, Tensor):
                kwargs[name] = self._steady(name, value)
        self.calibration.called(self._block)
        output = self.compiled(*steady, **kwargs)
        self._kind.called(self._block)
        return output

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        """Make copies and pickles hold the eager forward."""
        return _itself, (self.eager,)

    def _steady(self, key: int | str, value: Tensor) -> Tensor:
        """Return the input, or a boundary in its place, so that it requires grad if it ever did."""
        if not value.is_floating_point():
            return value
        if value.requires_grad:
            self._kind.differentiable.add(key)
            return value if needs_gradient(value) else boundary(value)
        return boundary(value) if self._must_require_grad(key) else value

    def _must_require_grad(self, key: int | str) -> bool:
        """Whether an input that does not require grad must be replaced by a boundary, which does.

        Decided once per trained set: when checkpointing recomputes a block, its inputs must be as before.
        """
        if self._generation != trained_set.generation():
            self._generation = trained_set.generation()
            self._decided.clear()
        wanted = key in self._kind.differentiable and not self._kind.runs_eagerly
        return self._decided.setdefault(key, wanted)


def _itself(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward
