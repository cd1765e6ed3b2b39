"""Every private torch name gtcompile uses, each with its reason; read at torch 2.13.0, 2.14.1 and 2.15.0.

Nothing else in the project imports from a `torch._*` module. A torch outside the supported range is refused
here, before any of these imports can fail in a less helpful way; `GTCOMPILE_ANY_TORCH=1` tries all the same.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import torch
from packaging.version import Version
from torch import fx

SUPPORTED = ("2.11", "2.16")
"""First supported torch release, first one that is not."""


def check_version(version: str, *, anyway: bool) -> None:
    """Refuse a torch that gtcompile was not tested with.

    Raises:
        ImportError: when `version` is outside the supported range and `anyway` is false.
    """
    release = Version(version).release
    first, end = (Version(bound).release for bound in SUPPORTED)
    if not (first <= release < end) and not anyway:
        raise ImportError(
            f"gtcompile supports torch >={SUPPORTED[0]},<{SUPPORTED[1]}; this is torch {version}. "
            f"Install a supported torch, or set GTCOMPILE_ANY_TORCH=1 to try this one."
        )


check_version(torch.__version__, anyway=os.environ.get("GTCOMPILE_ANY_TORCH") == "1")

# Ours to patch for the length of a capture or a compilation.
import torch._dynamo.config as dynamo_config  # noqa: E402

# What `torch.compiler.set_stance` was told: under "force_eager" compiled code stands aside.
import torch._dynamo.eval_frame as eval_frame  # noqa: E402
import torch._functorch.config as functorch_config  # noqa: E402
import torch._inductor.config as inductor_config  # noqa: E402

# Tensors inside transforms such as `vmap`, which have no memory of their own, and whether one is under way.
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor, maybe_current_level  # noqa: E402

# What operators that ONNX has not are made of.
from torch._decomp import get_decompositions  # noqa: E402

# Marks a size of an example as one that may change.
from torch._dynamo import mark_dynamic  # noqa: E402

# Where Dynamo writes its log of compilations.
from torch._dynamo import utils as dynamo_utils  # noqa: E402

# The backend route: AOTAutograd over a graph that Dynamo captured.
from torch._dynamo.backends.common import aot_autograd  # noqa: E402

# What a function wraps for which Dynamo is disabled.
from torch._dynamo.eval_frame import innermost_fn  # noqa: E402

# Dynamo: the error it raises on what it cannot capture, the errors of a backend that have it run a graph
# uncompiled, the errors of a backend that it hands on unchanged, and counters of its captures.
from torch._dynamo.exc import (  # noqa: E402
    ShortenTraceback,
    TorchDynamoException,
    exceptions_allowed_to_be_fallback,
)

# Whole-model capture: Dynamo's front end, then AOTAutograd's joint trace with descriptors (documented).
from torch._dynamo.functional_export import dynamo_graph_capture_for_export  # noqa: E402
from torch._dynamo.utils import counters as dynamo_counters  # noqa: E402

# What placeholders and outputs of a joint graph mean.
from torch._functorch._aot_autograd.descriptors import (  # noqa: E402
    BackwardTokenAOTOutput,
    BufferAOTInput,
    GradAOTOutput,
    InputMutationAOTOutput,
    ParamAOTInput,
    PlainAOTInput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors  # noqa: E402

# What the partitioner merges in a graph: nodes that compute the same from the same.
from torch._functorch.compile_utils import fx_graph_cse  # noqa: E402

# Splits a joint graph in two, recomputing what is cheap: the least saved for backward.
from torch._functorch.partitioners import min_cut_rematerialization_partition  # noqa: E402

# Re-running AOTAutograd after Dynamo has finished needs its tracing context again.
from torch._guards import TracingContext, tracing  # noqa: E402

# The operator that AOTAutograd wraps around one with a side effect.
from torch._higher_order_ops.effects import with_effects  # noqa: E402
from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # noqa: E402
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn, get_hash_for_files  # noqa: E402

# Inductor's notion of the current fake mode, needed when it is entered after a compilation is over.
from torch._inductor.virtualized import V as inductor_state  # noqa: E402, N811

# The classes of operators in a graph: those of aten, and those that call others.
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket  # noqa: E402

# Shapes without values: capture from a configuration alone. What is copied within a fake mode would be fake.
from torch._subclasses.fake_tensor import (  # noqa: E402
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

# What operators are traced with.
from torch._subclasses.functional_tensor import FunctionalTensor  # noqa: E402

# Sizes of fake tensors that only a run tells, and comparisons of sizes that are symbols.
from torch.fx.experimental.symbolic_shapes import (  # noqa: E402
    has_free_unbacked_symbols,
    statically_known_true,
    sym_eq,
)

# Generated code that empties its list of arguments, so that inputs are freed as soon as they are used.
from torch.fx.graph import _BoxedCodeGen as BoxedCodeGen  # noqa: E402

# Tells tensors that are made of other tensors: AOTAutograd flattens them, each into several inputs.
from torch.utils._python_dispatch import is_traceable_wrapper_subclass  # noqa: E402

# Applies a function to the leaves of nested tuples, lists and dictionaries.
from torch.utils._pytree import tree_map  # noqa: E402

# Which symbols stand for numbers that are no sizes.
from torch.utils._sympy.symbol import SymT, symbol_is_type  # noqa: E402

# What a reentrant checkpoint runs as.
from torch.utils.checkpoint import CheckpointFunction  # noqa: E402

# FlopCounterMode's dispatch mode: by itself it makes torch.compile fall back to eager while it counts.
from torch.utils.flop_counter import _FlopCounterMode as CountingMode  # noqa: E402

# What the functions of `torch.nn.utils.rnn` call.
pack_padded_sequence, pad_packed_sequence = torch._pack_padded_sequence, torch._pad_packed_sequence

# The autograd node whose backward is running.
current_autograd_node = torch._C._current_autograd_node

# What AOTAutograd compiles under: autocast has been traced already.
no_autocast = torch._C._DisableAutocast

# How autograd names the nodes of some functions, and transformers one of its hooks. These names are looked
# for in histories and in modules; there is no public way to tell such nodes or hooks.
REENTRANT_CHECKPOINT_NODE = "CheckpointFunctionBackward"
"""A reentrant activation checkpoint: the parameters that it uses are no part of the history."""
FSDP_POST_BACKWARD_NODE = "RegisterPostBackwardFunctionBackward"
"""`fully_shard` puts it on the inputs of a module; it hands gradients on as they are."""
EMBEDDING_HOOK = "make_inputs_require_grad"
"""Begins the names of the forward hooks by which transformers ("...grads") and PEFT have the outputs of
embeddings require grad, for the sake of activation checkpointing."""


# Strings that torch gives a meaning to, and that nothing but its source promises.

COMPILED_REGION = "CompiledFunctionBackward"
"""Name of the autograd node that AOTAutograd makes for a call of compiled code."""
BACKWARD_HOOKS = "_backward_hooks"
"""Attribute of a tensor: the hooks that autograd calls with its gradient, or None."""
BOXED_CALL = "_boxed_call"
"""Attribute that tells AOTAutograd that a function takes one list of inputs and empties it."""
IS_BACKWARD = "is_backward"
"""Keyword argument of `compile_fx_inner`: whether the graph is a backward."""
STATIC_INPUTS = "static_input_idxs"
"""Keyword argument of `compile_fx_inner`: positions of inputs that always have the same address."""
VISIBLE_OUTPUTS = "user_visible_output_idxs"
"""Key in the metadata of a graph's output node: positions of outputs whose strides Inductor must keep."""
RECOMPUTE = "recompute"
"""Key in a node's metadata: a `CheckpointPolicy` for the partitioner."""
SAVED_RANDOM_STATE = "rng_state_output"
"""Prefix of the names of random states that a forward saves so that its backward can draw the same
numbers."""
INDUCTOR_RANDOM = "inductor_rand"
"""Part of the names of Inductor's operators that draw random numbers, for which there is no eager code."""


def dense_kernel(operator: HigherOrderOperator) -> Callable[..., Any] | None:
    """What a higher-order operator runs on ordinary tensors: its subgraphs, operator by operator."""
    return operator.py_kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)


def compiled_code_stands_aside() -> bool:
    """Whether calls of compiled code run eagerly for now.

    They do under `torch.compiler.set_stance("force_eager")`, and inside the transforms of `torch.func`, whose
    tensors compiled code cannot differentiate.
    """
    return eval_frame._stance.stance == "force_eager" or maybe_current_level() is not None


def merge_equal_nodes(graph: fx.Graph, backward: Collection[fx.Node]) -> fx.Graph:
    """Merge the nodes that compute the same from the same, as the partitioner of this torch will.

    Since 2.14 it keeps a value of the forward alone apart from one that the backward needs too, lest it save
    the merged value for backward.

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
    """Whether Dynamo took floating-point numbers of Python for symbols in what it traced with this mode."""
    env = mode.shape_env if mode else None
    return env is not None and any(symbol_is_type(symbol, SymT.FLOAT) for symbol in env.backed_var_to_val)


@contextlib.contextmanager
def captured_as_compiled() -> Iterator[None]:
    """Have `torch.compiler.is_exporting()` be false in models that are captured, as under `torch.compile`.

    Dynamo's front end says otherwise, and models compute some things in another way for exporters. In 2.11
    whatever Dynamo traces is told that it is exported, under `torch.compile` too.
    """
    name = "torch._dynamo.functional_export._compiling_state_context"
    with mock.patch(name, contextlib.nullcontext, create=True):  # a torch without it says no such thing
        yield


@contextlib.contextmanager
def settings_not_logged() -> Iterator[None]:
    """Have Dynamo keep its settings out of its log of compilations.

    torch 2.11 cannot write `ignore_logging_functions`, and prints a traceback after every capture.
    """
    with mock.patch.object(dynamo_utils, "_get_dynamo_config_for_logging", return_value=None):
        yield


@contextlib.contextmanager
def told_to_be_compiled() -> Iterator[None]:
    """Have `torch.compiler.is_compiling()` be true in models that are traced without Dynamo."""
    with mock.patch.object(torch.compiler, "_is_compiling_flag", new=True):
        yield


@contextlib.contextmanager
def reentrant_checkpoints_passed_over() -> Iterator[None]:
    """Have reentrant checkpoints call what they hold; only a real backward can go through such a checkpoint.

    Dynamo takes them for what they hold too.
    """

    def call(function: Callable[..., Any], _preserve_random_state: bool, *args: Any) -> Any:
        return function(*args)

    with mock.patch.object(CheckpointFunction, "apply", call):
        yield


@contextlib.contextmanager
def lstm_kernels_of_eager() -> Iterator[None]:
    """Trace LSTMs as the kernels that eager PyTorch calls: oneDNN's or cuDNN's, with one fused backward.

    Tracers replace an LSTM by products of matrices, by a kernel in Python that its operator is given. But
    Dynamo breaks the graph at `nn.LSTM`, so that what runs is the eager kernel.
    """
    lstm = torch.ops.aten.lstm.input
    with mock.patch.dict(lstm.py_kernels, clear=True):
        lstm._dispatch_cache.clear()  # it remembers which kernel a key led to
        try:
            yield
        finally:
            lstm._dispatch_cache.clear()


__all__ = [
    "EMBEDDING_HOOK",
    "FSDP_POST_BACKWARD_NODE",
    "REENTRANT_CHECKPOINT_NODE",
    "BACKWARD_HOOKS",
    "BOXED_CALL",
    "COMPILED_REGION",
    "INDUCTOR_RANDOM",
    "IS_BACKWARD",
    "RECOMPUTE",
    "SAVED_RANDOM_STATE",
    "STATIC_INPUTS",
    "VISIBLE_OUTPUTS",
    "BackwardTokenAOTOutput",
    "BoxedCodeGen",
    "BufferAOTInput",
    "CountingMode",
    "CustomGraphPass",
    "CustomPartitionerFn",
    "FakeTensor",
    "FakeTensorMode",
    "FunctionalTensor",
    "GradAOTOutput",
    "HigherOrderOperator",
    "InputMutationAOTOutput",
    "OpOverload",
    "OpOverloadPacket",
    "ParamAOTInput",
    "PlainAOTInput",
    "ShortenTraceback",
    "TangentAOTInput",
    "TorchDynamoException",
    "TracingContext",
    "aot_autograd",
    "aot_export_joint_with_descriptors",
    "captured_as_compiled",
    "check_version",
    "compile_fx",
    "compile_fx_inner",
    "compiled_code_stands_aside",
    "current_autograd_node",
    "dense_kernel",
    "dynamo_config",
    "dynamo_counters",
    "dynamo_graph_capture_for_export",
    "exceptions_allowed_to_be_fallback",
    "functorch_config",
    "get_decompositions",
    "get_hash_for_files",
    "get_unwrapped",
    "has_free_unbacked_symbols",
    "has_symbolic_numbers",
    "inductor_config",
    "inductor_state",
    "innermost_fn",
    "is_functorch_wrapped_tensor",
    "is_traceable_wrapper_subclass",
    "lstm_kernels_of_eager",
    "mark_dynamic",
    "merge_equal_nodes",
    "min_cut_rematerialization_partition",
    "no_autocast",
    "reentrant_checkpoints_passed_over",
    "settings_not_logged",
    "statically_known_true",
    "sym_eq",
    "told_to_be_compiled",
    "tracing",
    "tree_map",
    "unset_fake_temporarily",
    "with_effects",
]
