"""A self-test of every private torch contract, run before the first compilation.

gtcompile relies on names, signatures, keys and settings of torch that may change with any release. Instead of
refusing a new torch by its version, it compiles one small block and checks the outcome. A broken contract is
named in one sentence; otherwise it might show as a wrong gradient, or as an error deep inside torch. The
result is kept in a file, so that the test runs once for each torch on each machine.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from gtcompile import torch_internals
from gtcompile.compiler.options import CompileOptions
from gtcompile.compiler.region import Region
from gtcompile.costs.backward_costs import BackwardCosts, backward_costs
from gtcompile.errors import GraphContractError
from gtcompile.graph.flops import count_flops
from gtcompile.state.trained_set import train_only
from gtcompile.torch_internals import (
    BOXED_CALL,
    COMPILED_REGION,
    DESCRIPTOR,
    DONATED_INPUTS,
    EXAMPLE_VALUE,
    INDUCTOR_RANDOM,
    IS_BACKWARD,
    RECOMPUTE,
    REENTRANT_CHECKPOINT_NODE,
    SAVED_RANDOM_STATE,
    STATIC_INPUTS,
    TESTED,
    VALUE,
    VISIBLE_OUTPUTS,
    FakeTensorMode,
    ShapeEnv,
    TangentAOTInput,
    TracingContext,
    cache_dir,
    compile_fx,
    dynamo_counters,
    functorch_config,
    get_hash_for_files,
    has_symbolic_numbers,
    min_cut_rematerialization_partition,
    no_dispatch_modes,
    separate_compilation_log,
    tracing,
)

logger = logging.getLogger(__name__)
WIDTH = 4


@functools.cache
def check_contracts() -> None:
    """Run the self-test, unless this torch has passed it on this machine.

    The test may run inside another compilation. It changes neither random states nor Dynamo's
    counters nor the count of a FLOP counter around it.

    Raises:
        GraphContractError: names the first contract that this torch breaks.
    """
    marker = marker_file()
    if marker.is_file():
        return
    with _undisturbed():
        run_self_test()
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        logger.info("the self-test will run again in the next process: %s", error)


def marker_file() -> Path:
    """The file that says that this torch has passed this version of the self-test on this Python."""
    sources = [str(inspect.getsourcefile(module)) for module in (torch_internals, sys.modules[__name__])]
    key = (torch.__version__, str(torch.version.git_version), platform.python_version(), *sources)
    digest = hashlib.sha256(repr(key).encode() + bytes(get_hash_for_files(tuple(sources)))).hexdigest()
    return Path(cache_dir()) / "gtcompile" / f"self-test-{digest[:32]}"


def run_self_test() -> None:
    """Check every contract.

    Raises:
        GraphContractError: names the first contract that is broken.
    """
    for subject, check in CHECKS.items():
        try:
            broken = next(check(), None)
        except Exception as error:
            reason = _innermost(error)
            text = str(reason).strip().partition("\n")[0]
            raise _broken(f"{subject} failed with {type(reason).__name__}: {text}") from error
        if broken is not None:
            raise _broken(broken)


def _innermost(error: BaseException) -> BaseException:
    """The original error: Dynamo wraps errors of backends, and `backward_costs` wraps those of a capture."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return error if inner is None else _innermost(inner)


def _broken(contract: str) -> GraphContractError:
    return GraphContractError(
        f"torch {torch.__version__} breaks a contract that gtcompile relies on: {contract}. {TESTED}; "
        f"install one of these"
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Run the test as in a fresh process, without the modes that the caller has entered."""
    counted = copy.deepcopy(dict(dynamo_counters))
    with (
        tracing(None),
        separate_compilation_log(),
        no_dispatch_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        yield
    dynamo_counters.clear()
    dynamo_counters.update(counted)


class _Block(nn.Module):
    """A residual block: small, with parameters below those of the second trained set."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, device="cpu", dtype=torch.float32)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, device="cpu", dtype=torch.float32)
        self.down = nn.Linear(2 * WIDTH, WIDTH, device="cpu", dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = (x + self.down(torch.tanh(self.up(self.norm(x))))).square().mean()
        return loss


TRAINED = (frozenset({"up.weight", "norm.bias"}), frozenset({"down.weight"}))
"""Two sets, the second of which ends the backward higher up."""


def _input() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * WIDTH, device="cpu", dtype=torch.float32).view(2, WIDTH)


def _settings() -> Iterator[str]:
    for module, names in torch_internals.SETTINGS:
        yield from (f"{module.__name__} has no setting {n}" for n in names if not hasattr(module, n))


def _attributes() -> Iterator[str]:
    for owner, name, use in torch_internals.ATTRIBUTES:
        if name not in dir(owner):
            yield f"{owner.__name__} has no {name} ({use})"
    has_symbolic_numbers(FakeTensorMode(shape_env=ShapeEnv()))


def _partitioner() -> Iterator[str]:
    """Read the source: only a large model makes the partitioner recompute and save random states."""
    source = inspect.getsource(inspect.getmodule(min_cut_rematerialization_partition))  # type: ignore[arg-type]
    if f'"{RECOMPUTE}"' not in source:
        yield f"the partitioner no longer reads {RECOMPUTE!r} in the metadata of nodes"
    if SAVED_RANDOM_STATE not in source:
        yield f"the partitioner no longer calls saved random states {SAVED_RANDOM_STATE!r}"


def _checkpoints() -> Iterator[str]:
    x = _input().requires_grad_()
    output: Any = checkpoint(torch.tanh, x, use_reentrant=True)
    if output.grad_fn.name() != REENTRANT_CHECKPOINT_NODE:
        name = output.grad_fn.name()
        yield f"to autograd a reentrant checkpoint is {name}, not {REENTRANT_CHECKPOINT_NODE}"


def _block() -> Iterator[str]:
    """Compile the block in both ways, train two sets, compare with eager PyTorch and the predicted FLOPs."""
    predicted = backward_costs(_Block(), {"x": _input()})
    for variants in ("hoisted", "specialized"):
        options = CompileOptions(compiler="eager", variants=variants)
        yield from (f"with {variants} variants, {broken}" for broken in _compiled_block(options, predicted))


def _compiled_block(options: CompileOptions, predicted: BackwardCosts) -> Iterator[str]:
    block, graphs = _Block(), list[fx.GraphModule]()
    eager = copy.deepcopy(block)

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return Region(graph, example_inputs, options)

    compiled: Any = torch.compile(block, backend=backend)
    for trained in TRAINED:
        train_only(compiled, trained)
        loss = compiled(_input())
        yield from _graph_of_dynamo(graphs[0])
        if loss.grad_fn.name() != COMPILED_REGION:
            yield f"to autograd compiled code is {loss.grad_fn.name()}, not {COMPILED_REGION}"
        loss.backward()
        yield from _wrong_gradients(block, eager, trained)
        with count_flops() as counter:
            compiled(_input()).backward()
        block.zero_grad()
        counted, expected = counter.get_total_flops(), predicted.step_flops(trained)
        if counted != expected:
            yield f"a compiled step took {counted} FLOPs where {expected} were predicted"
    if len(graphs) > 1:
        yield "a new trained set made torch.compile capture the block again"


def _graph_of_dynamo(graph: fx.GraphModule) -> Iterator[str]:
    for node in graph.graph.find_nodes(op="placeholder"):
        if EXAMPLE_VALUE not in node.meta:
            yield f"inputs of Dynamo's graphs have no {EXAMPLE_VALUE!r} in their metadata"


def _wrong_gradients(block: nn.Module, eager: nn.Module, trained: frozenset[str]) -> Iterator[str]:
    names = sorted(trained)
    expected = torch.autograd.grad(eager(_input()), [eager.get_parameter(name) for name in names])
    found = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    if found.keys() != trained:
        yield f"with {', '.join(names)} trained, gradients came for {', '.join(sorted(found)) or 'nothing'}"
    for name, gradient in zip(names, expected, strict=True):
        if not torch.equal(found[name], gradient):
            yield f"the gradient of {name} in compiled code differs from that of eager PyTorch"


def _inductor() -> Iterator[str]:
    """Run Inductor up to its code generator, which would take longer than all other checks together."""
    broken: list[str] = []
    sides: list[bool] = []

    def inner_compile(module: fx.GraphModule, _: Sequence[Any], **options: Any) -> Callable[..., Any]:
        sides.append(bool(options.get(IS_BACKWARD)))
        broken.extend(_graph_of_inductor(module, options))

        def run(arguments: list[Any]) -> Any:
            values = list(arguments)
            arguments.clear()
            return fx.Interpreter(module).run(*values)

        setattr(run, BOXED_CALL, True)
        return run

    def backend(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        settings = dict.fromkeys(("donated_buffer", "enable_autograd_cache"), False)
        with functorch_config.patch({**settings, "force_non_lazy_backward_lowering": True}):
            code = compile_fx(graph, example_inputs, inner_compile=inner_compile, config_patches={})  # type: ignore[arg-type]
        if not hasattr(TracingContext.get().fw_metadata, DONATED_INPUTS):
            broken.append(f"AOTAutograd's metadata has no {DONATED_INPUTS}")
        return code

    block = _Block()
    torch.compile(lambda x: nn.functional.dropout(block(x)), backend=backend)(_input())
    yield from broken
    if sides != [False, True]:
        yield f"compile_fx_inner was not called for a forward, then with {IS_BACKWARD}=True for a backward"


def _graph_of_inductor(module: fx.GraphModule, options: dict[str, Any]) -> Iterator[str]:
    inputs, output = module.graph.find_nodes(op="placeholder"), module.graph.output_node()
    if STATIC_INPUTS not in options:
        yield f"compile_fx_inner is not given {STATIC_INPUTS}"
    for key in (DESCRIPTOR, VISIBLE_OUTPUTS):
        if key not in output.meta:
            yield f"the outputs of Inductor's graphs have no {key!r} in their metadata"
    if not all(VALUE in node.meta for node in inputs):
        yield f"inputs of Inductor's graphs have no {VALUE!r} in their metadata"
    if options.get(IS_BACKWARD):
        if not any(isinstance(node.meta.get(DESCRIPTOR), TangentAOTInput) for node in inputs):
            yield f"tangents of Inductor's backward graphs have no {DESCRIPTOR!r} in their metadata"
    elif not any(INDUCTOR_RANDOM in str(node.target) for node in module.graph.nodes):
        yield f"Inductor's operators for random numbers no longer have {INDUCTOR_RANDOM!r} in their names"


CHECKS: dict[str, Callable[[], Iterator[str]]] = {
    "looking up torch's settings": _settings,
    "looking up private attributes": _attributes,
    "reading the partitioner": _partitioner,
    "a reentrant checkpoint": _checkpoints,
    "compiling and training a small block": _block,
    "Inductor's part before code generation": _inductor,
}
"""The checks, by the subject that messages name; each yields a sentence for every broken contract."""
