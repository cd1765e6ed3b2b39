"""Every private torch name that gtcompile uses, with the reason; read at torch 2.11, 2.13, 2.14 and 2.15.

No other module imports from a `torch._*` module, and the strings that torch may change (names of nodes, keys,
prefixes) are constants here: this is the one file to touch for a new torch. A torch that is too
old, or that lacks one of the names, is refused here in one sentence. `gtcompile.compiler.self_test` checks,
before the first compilation, that the names still do what they did.
"""

import contextlib
import inspect
import threading
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import torch
from packaging.version import Version
from torch import fx

SUPPORTED = ("2.11", "2.16")
"""The first torch release that gtcompile runs on, and the first that it was not tested with."""
TESTED = f"gtcompile was tested with torch >={SUPPORTED[0]},<{SUPPORTED[1]}"


def check_version(version: str) -> None:
    """Refuse a torch that is too old. A newer one than was tested is left to the self-test.

    Raises:
        ImportError: says which torch is needed and which one is here.
    """
    if Version(version).release < Version(SUPPORTED[0]).release:
        raise ImportError(f"gtcompile needs torch {SUPPORTED[0]} or newer, and this is torch {version}")


check_version(torch.__version__)

try:
    # --- Dynamo: from Python code to a graph ---

    # Settings that are patched during a capture or a compilation.
    import torch._dynamo.config as dynamo_config

    # Holds the stance of `torch.compiler.set_stance`: under "force_eager" compiled code must not run.
    import torch._dynamo.eval_frame as eval_frame

    # Writes Dynamo's log of compilations, which 2.11 cannot do with our settings.
    from torch._dynamo import utils as dynamo_utils

    # Marks a size of an example input as one that may change.
    from torch._dynamo import mark_dynamic

    # Makes a backend out of a compiler for the forward graph, one for the backward, and a partitioner.
    from torch._dynamo.backends.common import aot_autograd

    # Takes the wrapper off a function that `torch.compiler.disable` wrapped: regions run undisturbed anyway.
    from torch._dynamo.eval_frame import innermost_fn

    # What Dynamo raises when it cannot capture; the errors of a backend that it raises unchanged; and those
    # after which it would run a graph uncompiled.
    from torch._dynamo.exc import (
        ShortenTraceback,
        TorchDynamoException,
        exceptions_allowed_to_be_fallback,
    )

    # Captures a whole model for `aot_export_joint_with_descriptors`.
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export

    # Counts captured graphs and Inductor's cache hits.
    from torch._dynamo.utils import counters as dynamo_counters

    # The state of a compilation. Compiling another variant later needs the state of the first one again.
    from torch._guards import TracingContext, tracing

    # --- AOTAutograd: from a graph to its joint forward and backward graph ---

    # Settings that are patched during a compilation: donation, caching, memory budget.
    import torch._functorch.config as functorch_config

    # The meaning of each input and output of a joint graph.
    from torch._functorch._aot_autograd.descriptors import (
        BackwardTokenAOTOutput,
        BufferAOTInput,
        GradAOTOutput,
        InputMutationAOTOutput,
        ParamAOTInput,
        PlainAOTInput,
        TangentAOTInput,
    )

    # Traces the joint graph of a captured model.
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    # Merges equal nodes, as the partitioner does: costs are counted on the graph that will run.
    from torch._functorch.compile_utils import fx_graph_cse

    # Splits a joint graph in two so that as little as possible is saved for backward.
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    # The operator that AOTAutograd wraps around one with a side effect.
    from torch._higher_order_ops.effects import with_effects

    # Autocast was traced into the graph; AOTAutograd switches it off while it compiles, and so do we.
    no_autocast = torch._C._DisableAutocast

    # --- Inductor: from a graph to code ---

    # Settings that are patched during a compilation.
    import torch._inductor.config as inductor_config

    # Compile a graph with its backward, and compile one graph.
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # Passes and partitioners that Inductor calls, and a hash of their sources for its cache's key.
    from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn, get_hash_for_files

    # The folder in which Inductor keeps what it compiled.
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    # Holds Inductor's fake mode, which is needed again when more is compiled after a compilation has ended.
    from torch._inductor.virtualized import V as inductor_state  # noqa: N811

    # --- Fake tensors, symbolic sizes, dispatch modes ---

    # The memory behind a tensor inside `vmap`, which has none of its own, and whether a transform is running.
    from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_current_level

    # Tensors with shapes but without values, and their mode. Copies made inside the mode would be fake too.
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

    # The class of the tensors that AOTAutograd traces with.
    from torch._subclasses.functional_tensor import FunctionalTensor

    # Symbolic sizes: their environment; whether one depends on data; whether an equation is known to hold.
    from torch.fx.experimental.symbolic_shapes import (
        ShapeEnv,
        has_free_unbacked_symbols,
        statically_known_true,
        sym_eq,
    )

    # Recognises symbols for floating-point numbers, which are no sizes.
    from torch.utils._sympy.symbol import SymT, symbol_is_type

    # Runs code without the dispatch modes around it, such as a FLOP counter.
    from torch.utils._python_dispatch import _disable_current_modes as no_dispatch_modes

    # Recognises tensors made of other tensors, which AOTAutograd flattens into several inputs.
    # Sees every operator that a forward runs, to record the numbers that it reads from tensors.
    from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

    # --- Graphs and operators ---

    # Rewrites operators that ONNX lacks into others.
    from torch._decomp import get_decompositions

    # Operators of aten, all overloads of one, and operators that call other operators.
    from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

    # Generates code that empties its list of arguments, so that inputs are freed as soon as possible.
    from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen

    # Applies a function to the leaves of nested tuples, lists and dictionaries.
    from torch.utils._pytree import tree_map

    # `torch.nn.utils.rnn` calls these two.
    pack_padded_sequence, pad_packed_sequence = torch._pack_padded_sequence, torch._pad_packed_sequence

    # --- Autograd at run time ---

    # What Dynamo's graphs call where a part runs under `torch.enable_grad()` or `torch.no_grad()`.
    set_grad_mode = torch._C._set_grad_enabled

    # The autograd node whose backward is running: its metadata holds the trained set of the forward.
    current_autograd_node = torch._C._current_autograd_node

    # The autograd function of reentrant checkpoints.
    from torch.utils.checkpoint import CheckpointFunction

    # FlopCounterMode's dispatch mode. Used directly, it would make torch.compile run eagerly while it counts.
    from torch.utils.flop_counter import _FlopCounterMode as CountingMode
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"gtcompile uses private parts of torch, and torch {torch.__version__} lacks one of them: {error}. "
        f"{TESTED}; install one of these"
    ) from error

COMPILED_REGION = "CompiledFunctionBackward"
"""Name of the autograd node of a compiled graph; the trained set reaches the backward in its metadata."""

REENTRANT_CHECKPOINT_NODE = "CheckpointFunctionBackward"
"""Name of the autograd node of a reentrant checkpoint, which hides the graph of what it computes."""

FSDP_POST_BACKWARD_NODE = "RegisterPostBackwardFunctionBackward"
"""Name of the autograd node that `fully_shard` puts on the inputs of a module; it passes gradients on."""

EMBEDDING_HOOK = "make_inputs_require_grad"
"""Beginning of the names of the forward hooks by which transformers ("...grads") and PEFT make the outputs of
embeddings require grad, for reentrant checkpointing."""

BACKWARD_HOOKS = "_backward_hooks"
"""Attribute of a tensor: the hooks that autograd calls with its gradient, or None."""

DESCRIPTOR = "desc"
"""Key in the metadata of a joint graph's placeholders and output: what each input and output means."""

VALUE = "val"
"""Key in the metadata of a joint graph's nodes: the fake tensor that the node computes."""

EXAMPLE_VALUE = "example_value"
"""Key in the metadata of nodes of a graph that Dynamo captured: the fake tensor that the node computes."""

TRACING_CONTEXT = "tracing_context"
"""Key in the metadata of a graph that `dynamo_graph_capture_for_export` captured."""

RECOMPUTE = "recompute"
"""Key in a node's metadata that makes the partitioner save or recompute its value."""

PARTITIONER_TAG, IN_BACKWARD = "partitioner_tag", "must_be_in_backward"
"""Key in a node's metadata, and its value, by which the partitioner never puts the node into the forward."""

FREE_TO_SAVE = "static_lifetime_input_indices"
"""Keyword argument of the partitioner: the inputs that exist anyway, so that saving them costs no memory."""

SAVED_RANDOM_STATE = "rng_state_output"
"""Prefix of the nodes that the partitioner adds to save a random state for recomputation."""

INDUCTOR_RANDOM = "inductor_rand"
"""Part of the names of the operators by which Inductor draws random numbers; only compiled code can."""

IS_BACKWARD = "is_backward"
"""Keyword argument of `compile_fx_inner` that is true for a backward graph."""

STATIC_INPUTS = "static_input_idxs"
"""Keyword argument of `compile_fx_inner`: the inputs whose addresses never change."""

VISIBLE_OUTPUTS = "user_visible_output_idxs"
"""Key in the metadata of a graph's output: the outputs whose strides Inductor must keep."""

DONATED_INPUTS = "bw_donated_idxs"
"""Attribute of AOTAutograd's metadata: the saved tensors that the backward may overwrite."""

BOXED_CALL = "_boxed_call"
"""Attribute of a compiled function that takes its arguments as one list, which it empties."""

SETTINGS = (
    (dynamo_config, ("automatic_dynamic_shapes", "ignore_logging_functions", "recompile_limit")),
    (
        functorch_config,
        (
            "activation_memory_budget",
            "donated_buffer",
            "enable_autograd_cache",
            "force_non_lazy_backward_lowering",
        ),
    ),
    (inductor_config, ("custom_partitioner_fn", "fallback_random", "post_grad_custom_pre_pass")),
)
"""The settings that are patched, by module. A patch of an unknown setting fails late or changes nothing."""

ATTRIBUTES = (
    (torch.Tensor, BACKWARD_HOOKS, "the hooks of a parameter, which run only while it is trained"),
    (torch.Tensor, "_is_view", "whether an output is a view of an input"),
    (torch.Tensor, "_version", "how often a tensor was written into"),
    (torch.UntypedStorage, "_cdata", "the identity of a storage"),
    (torch.nn.Module, "_compiled_call_impl", "the compiled code of a module that was compiled in place"),
    (FakeTensor, "item_memo", "the symbol that the `.item()` of a fake tensor stands for"),
    (FakeTensorMode, "dispatch", "the call of an operator on fake tensors, overridden to keep known values"),
    (FakeTensorMode, "from_tensor", "makes a fake tensor, overridden to keep known values"),
)
"""Private attributes that other modules read: class, name, use."""


def dense_kernel(operator: HigherOrderOperator) -> Callable[..., Any] | None:
    """The kernel by which a higher-order operator runs its subgraphs on ordinary tensors, or None."""
    return operator.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)


def compiled_code_is_off() -> bool:
    """Whether calls of compiled code run eagerly for now.

    They do under `torch.compiler.set_stance("force_eager")`, and inside the transforms of `torch.func`, whose
    tensors compiled code cannot differentiate.
    """
    return eval_frame._stance.stance == "force_eager" or maybe_current_level() is not None


def merge_equal_nodes(graph: fx.Graph, backward: Collection[fx.Node]) -> fx.Graph:
    """Merge nodes that apply one operator to the same inputs, as the partitioner of this torch will.

    Since 2.14 the partitioner does not merge a value that only the forward needs with one that the backward
    needs too: the merged value would be saved for backward.

    Args:
        graph: a joint graph.
        backward: the nodes that gradients depend on.

    Returns:
        A new graph.
    """
    if "extra_node_key" in inspect.signature(fx_graph_cse).parameters:
        return fx_graph_cse(graph, extra_node_key=backward.__contains__)  # type: ignore[call-arg, unused-ignore]
    return fx_graph_cse(graph)


def has_symbolic_numbers(mode: FakeTensorMode | None) -> bool:
    """Whether Dynamo traced Python's floating-point numbers as symbols under this fake mode."""
    env = mode.shape_env if mode else None
    return env is not None and any(symbol_is_type(symbol, SymT.FLOAT) for symbol in env.backed_var_to_val)


@contextlib.contextmanager
def captured_as_compiled() -> Iterator[None]:
    """Make `torch.compiler.is_exporting()` false while a model is captured, as it is under `torch.compile`.

    `dynamo_graph_capture_for_export` makes it true, and some models compute differently for exporters. In
    2.11 it is true for everything that Dynamo traces, under `torch.compile` too.
    """
    name = "torch._dynamo.functional_export._compiling_state_context"
    with mock.patch(name, contextlib.nullcontext, create=True):  # 2.11 does not have it
        yield


@contextlib.contextmanager
def settings_not_logged() -> Iterator[None]:
    """Keep Dynamo's settings out of its log of compilations.

    torch 2.11 cannot write `ignore_logging_functions` there and prints a traceback after every capture.
    """
    with mock.patch.object(dynamo_utils, "_get_dynamo_config_for_logging", return_value=None):
        yield


@contextlib.contextmanager
def separate_compilation_log() -> Iterator[None]:
    """Give a compilation that runs inside another one a separate log.

    Dynamo's log has room for one forward and one backward of each compilation, and refuses a second.
    """
    fresh: dict[str, Any] = {"_metrics_context_tls": threading.local(), "CHROMIUM_EVENT_LOG": None}
    with mock.patch.multiple(dynamo_utils, create=True, **fresh):
        yield


@contextlib.contextmanager
def as_if_compiling() -> Iterator[None]:
    """Make `torch.compiler.is_compiling()` true while a model is traced without Dynamo."""
    with mock.patch.object(torch.compiler, "_is_compiling_flag", new=True):
        yield


@contextlib.contextmanager
def reentrant_checkpoints_as_calls() -> Iterator[None]:
    """Replace reentrant checkpoints by plain calls while a model is traced, as Dynamo does.

    Tracing cannot go through a reentrant checkpoint: it builds its graph only in a real backward.
    """

    def call(function: Callable[..., Any], _preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)

    with mock.patch.object(CheckpointFunction, "apply", call):
        yield


@contextlib.contextmanager
def eager_lstm_kernels() -> Iterator[None]:
    """Trace LSTMs as the kernels that eager PyTorch calls: oneDNN's or cuDNN's, with one fused backward.

    A Python kernel of the operator makes tracers decompose an LSTM into matrix products. But Dynamo breaks
    the graph at `nn.LSTM`, so the eager kernel is the one that runs.
    """
    lstm = torch.ops.aten.lstm.input
    with mock.patch.dict(lstm.py_kernels, clear=True):
        lstm._dispatch_cache.clear()  # forget the Python kernel
        try:
            yield
        finally:
            lstm._dispatch_cache.clear()
