"""Lower a training step to an ONNX model of standard operators, and write the model."""

import contextlib
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from gtcompile.errors import CaptureError
from gtcompile.tools.onnx.optimizer_step import OptimizerStep
from gtcompile.tools.onnx.training_step import TrainingStep
from gtcompile.torch_internals import get_decompositions

aten = torch.ops.aten
OPSET = 18
LARGEST_FILE = 2_000_000_000
"""Bytes. Protobuf ends at 2 GiB; a larger model keeps its constants in a second file."""
DECOMPOSED = (
    # torch's exporter accepts these and gets the gradient of a mean over unignored labels wrong
    aten.nll_loss_forward,
    aten.nll_loss_backward,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
    # these it has no lowering for
    aten._safe_softmax,
    aten._softmax_backward_data,
    aten._log_softmax_backward_data,
    aten._fused_rms_norm_backward,
    aten.elu_backward,
    aten.embedding_dense_backward,
    aten.gelu_backward,
    aten.hardsigmoid_backward,
    aten.hardswish_backward,
    aten.huber_loss_backward,
    aten.leaky_relu_backward,
    aten.mse_loss_backward,
    aten.native_batch_norm_backward,
    aten.native_group_norm,
    aten.native_group_norm_backward,
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.select_backward,
    aten.sigmoid_backward,
    aten.slice_backward,
    aten.smooth_l1_loss_backward,
    aten.softplus_backward,
    aten.tanh_backward,
    aten.threshold_backward,
)
"""Operators that are decomposed before the exporter sees them."""
NO_LOWERING = re.compile(r"No ONNX function found for <?(?:OpOverload\(op='([^']+)'|([\w:.]+))")


def lower(
    step: TrainingStep | OptimizerStep,
    tensors: Sequence[torch.Tensor],
    dynamic: Mapping[str, Mapping[int, Any]] | None = None,
) -> onnx.ModelProto:
    """Lower a step to an ONNX model, checked and with inferred shapes.

    Args:
        step: what to lower.
        tensors: one example per name in `step.input_names`.
        dynamic: the dimensions that may change as `torch.export.Dim`s, by input name.

    Raises:
        CaptureError: an operator has no ONNX lowering, or the model is not valid.
    """
    shapes = tuple((dynamic or {}).get(name) for name in step.input_names) if dynamic else None
    with _exporter_quiet(), torch.no_grad():
        try:
            program = torch.export.export(
                step, tuple(tensors), dynamic_shapes=(shapes,) if shapes else None, strict=False
            )
            program = program.run_decompositions(
                {**torch.export.default_decompositions(), **get_decompositions(list(DECOMPOSED))}
            )
            exported = torch.onnx.export(
                program,
                input_names=list(step.input_names),
                output_names=list(step.output_names),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise CaptureError(_explain(error)) from error
    if exported is None:
        raise CaptureError("torch.onnx.export returned no model; try the newest onnxscript")
    proto: onnx.ModelProto = exported.model_proto
    return _checked(proto, step)


@contextlib.contextmanager
def _exporter_quiet() -> Iterator[None]:
    """Silence the exporter, which warns about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explain(error: BaseException) -> str:
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__
    found = NO_LOWERING.search("\n".join(causes))
    if found:
        return (
            f"operator {found.group(1) or found.group(2)} has no ONNX lowering. Use an implementation "
            f"of that layer in plain operators (attn_implementation='eager', say), or freeze what "
            f"only its backward serves."
        )
    return (
        f"torch.onnx.export failed: {causes[-1].strip().splitlines()[0] if causes[-1].strip() else error!r}"
    )


def append(step: onnx.ModelProto, update: onnx.ModelProto) -> onnx.ModelProto:
    """Let an update follow a training step: it reads the gradients, which are outputs no more.

    Args:
        step: outputs `loss` and `gradient.FQN`; changed in place.
        update: reads gradients, parameters and inputs of its own.

    Raises:
        CaptureError: the model is not valid.
    """
    added = onnx.compose.add_prefix(update, "update.", rename_inputs=False, rename_outputs=False).graph
    present = {value.name for value in (*step.graph.input, *step.graph.output)}
    step.graph.input.extend(value for value in added.input if value.name not in present)
    step.graph.node.extend(added.node)
    step.graph.initializer.extend(added.initializer)
    del step.graph.output[1:]
    step.graph.output.extend(added.output)
    return step if is_large(step) else _inferred(step)


def _checked(proto: onnx.ModelProto, step: TrainingStep | OptimizerStep) -> onnx.ModelProto:
    """Check the operators and names of an exported model, and infer its shapes."""
    domains = {node.domain for node in proto.graph.node} - {"", "ai.onnx"}
    if domains or proto.functions:
        named = sorted({n.op_type for n in proto.graph.node if n.domain not in ("", "ai.onnx")})
        raise CaptureError(f"expected operators of ONNX's default domain alone, got {', '.join(named)}")
    kept = {value.name for value in proto.graph.input}
    missing = [name for name in step.input_names if name not in kept]
    if missing:
        raise CaptureError(f"the exporter lost the inputs {', '.join(missing)}")
    if tuple(value.name for value in proto.graph.output) != step.output_names:
        raise CaptureError("the exporter renamed outputs: a trained parameter is probably its own gradient")
    return proto if is_large(proto) else _inferred(proto)


def _inferred(proto: onnx.ModelProto) -> onnx.ModelProto:
    del proto.graph.value_info[:]  # stale where the exporter's optimizer has rewritten the graph
    try:
        proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise CaptureError(f"the exported step is not valid ONNX, so it is not written: {reason}") from error
    return proto


def size_of(proto: onnx.ModelProto) -> int:
    """Bytes of a model; constants are counted one by one, since protobuf cannot count beyond 2 GB."""
    constants = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    return constants if constants >= LARGEST_FILE else int(proto.ByteSize())


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether a model needs a second file for its constants."""
    return size_of(proto) >= LARGEST_FILE


def write(proto: onnx.ModelProto, path: Path) -> None:
    """Write a model whole; if anything fails, the path keeps its old content.

    A model beyond 2 GB has its constants in `NAME.data` in the same folder.

    Raises:
        ValueError: the folder does not exist or cannot be written to.
    """
    if not path.parent.is_dir():
        raise ValueError(f"no folder {str(path.parent)!r} to write {path.name} to; make it first")
    external = is_large(proto)
    data = path.name + ".data"
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            draft = Path(folder) / path.name
            onnx.save_model(proto, str(draft), save_as_external_data=external, location=data)
            if external:
                onnx.checker.check_model(str(draft), full_check=True)
                if (Path(folder) / data).exists():  # not where every constant is small
                    (Path(folder) / data).replace(path.parent / data)
            draft.replace(path)
    except OSError as error:
        raise ValueError(f"could not write {str(path)!r}: {error.strerror or error}") from error
