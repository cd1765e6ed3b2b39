"""Logits and loss at labelled positions alone: exact, and cheaper where prompts and padding have no label.

The head of a language model multiplies every hidden state by the whole vocabulary, but the loss ignores the
positions whose label is -100. `add_labelled_positions` writes the others into the batch, on the CPU, where
the collator runs; `only_labelled_logits` makes the head take just these hidden states. Loss and gradients are
those of all logits, up to rounding: the same sum with the zeros left out.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gtcompile.capture.model_io import unwrap
from gtcompile.errors import GTCompileError

POSITIONS: Final = "labelled_positions"
"""Key in the batch: indices of hidden states, flattened over rows and tokens; int64 of shape [k]."""
TARGETS: Final = "labelled_targets"
"""Key in the batch: the next token at each of these positions, or -100 for padding; int64 of shape [k]."""
IGNORED: Final = -100
"""The label that transformers' losses ignore."""
NO_POSITIONS: Final = (
    "only_labelled_logits: a batch in training names no labelled positions, so all logits are computed; "
    "make batches with gtcompile.add_labelled_positions(batch)"
)
"""The warning that nothing is saved."""


def add_labelled_positions(batch: Mapping[str, Any], *, multiple: int = 64) -> dict[str, Any]:
    """Return a batch of a causal language model that also names its labelled positions.

    Wrap the collator with it: `data_collator=lambda rows: add_labelled_positions(collate(rows))`.

    Args:
        batch: keyword arguments of the model's forward, among them `labels`, int64 of shape [rows, tokens].
        multiple: the number of positions is rounded up to a multiple of this, so that few shapes occur. Costs
            depend on shapes: with a larger multiple, batches cost more and differ less.

    Raises:
        ValueError: there are no labels of this shape, or `multiple` is below 1.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        found = f"shape {list(labels.shape)}" if isinstance(labels, torch.Tensor) else type(labels).__name__
        raise ValueError(f'expected batch["labels"] to be a tensor of shape [rows, tokens], got {found}')
    if multiple < 1:
        raise ValueError(f"multiple: expected at least 1, got {multiple}")
    next_tokens = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    positions = (next_tokens != IGNORED).nonzero().squeeze(1)
    count = min(max(1, -(-len(positions) // multiple)) * multiple, len(next_tokens))
    padding = (0, count - len(positions))
    return {
        **batch,
        POSITIONS: nn.functional.pad(positions, padding),
        TARGETS: nn.functional.pad(next_tokens[positions], padding, value=IGNORED),
    }


def only_labelled_logits(model: nn.Module) -> "Installed":
    """Compute the head and the loss of a causal language model at labelled positions alone, in training.

    It concerns batches from `add_labelled_positions`. Others, and evaluation mode, compute all logits; in
    training there is a warning, except in a model that is compiled as a whole.
    `output.logits` of such a training step has shape [1, k, vocabulary], k being the number of positions.

    It needs batches that are not cut by rows after the collator: not `nn.DataParallel`, and not accelerate's
    `dispatch_batches`, the default for an `IterableDataset` on several processes.

    Call it on the module that the training loop calls, after `get_peft_model` and before
    `DistributedDataParallel`.

    Args:
        model: of transformers, or one of peft around it.

    Returns:
        A handle whose `remove` undoes all of it.

    Raises:
        GTCompileError: the model is no causal language model of transformers.
    """
    return Installed(model, _causal_model(model))


@contextlib.contextmanager
def all_logits_meant() -> Iterator[None]:
    """Within the block, batches in training may do without labelled positions: there is no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", NO_POSITIONS.partition(",")[0])
        yield


class Installed:
    """What `only_labelled_logits` changed: hooks of the model and its head, and the model's loss function.

    Args:
        model: gets the batches.
        base: the causal language model that it is or contains.
    """

    def __init__(self, model: nn.Module, base: Any) -> None:
        self._base, self._former_loss = base, base.loss_function
        self._kept: dict[str, torch.Tensor] = {}
        """Labels, positions and targets of the present forward."""
        self._hooks: tuple[RemovableHandle, ...] = (
            model.register_forward_pre_hook(self._take_from_batch, with_kwargs=True),
            base.get_output_embeddings().register_forward_pre_hook(self._select),
            model.register_forward_hook(self._forget, always_call=True),
        )

        @functools.wraps(self._former_loss)  # its signature tells that it takes `shift_labels`
        def loss_function(*args: Any, **kwargs: Any) -> Any:
            return self._loss(*args, **kwargs)

        base.loss_function = loss_function

    def remove(self) -> None:
        """Undo it: the head and the loss see every position again."""
        for hook in self._hooks:
            hook.remove()
        self._base.loss_function = self._former_loss

    def _take_from_batch(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Keep the positions and targets, and hand the rest of the batch on."""
        self._kept.clear()
        if module.training and POSITIONS in kwargs:
            self._kept.update({key: _argument(kwargs, key) for key in (POSITIONS, TARGETS, "labels")})
        elif module.training and kwargs.get("labels") is not None and not torch.compiler.is_compiling():
            warnings.warn(NO_POSITIONS, stacklevel=1)
        return args, {key: value for key, value in kwargs.items() if key not in (POSITIONS, TARGETS)}

    def _select(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Hand the head the hidden states at labelled positions alone."""
        if POSITIONS not in self._kept:
            return args
        hidden, *rest = args
        labels = self._kept["labels"]
        if hidden.shape[:2] != labels.shape:
            raise GTCompileError(
                f"only_labelled_logits: the head got hidden states of {list(hidden.shape[:2])} rows and "
                f"tokens for labels of {list(labels.shape)}; adapters that add tokens are refused"
            )
        return hidden.flatten(0, 1)[self._kept[POSITIONS]].unsqueeze(0), *rest

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's own loss of the targets at these positions."""
        if TARGETS in self._kept:
            labels = kwargs["shift_labels"] = self._kept.pop(TARGETS).unsqueeze(0)
        return self._former_loss(logits, labels, *args, **kwargs)

    def _forget(self, module: nn.Module, args: Any, output: Any) -> None:
        """Check that the loss was computed with the targets.

        `generate` of a model in peft calls the model inside, and `_take_from_batch` does not run; so nothing
        may be kept from one forward to the next.
        """
        computed = TARGETS not in self._kept
        self._kept.clear()
        if not computed and output is not None:  # None after an error
            raise GTCompileError(
                "only_labelled_logits: the model computed its loss without its loss_function"
            )


def _argument(kwargs: dict[str, Any], key: str) -> torch.Tensor:
    value = kwargs.get(key)
    if not isinstance(value, torch.Tensor):
        raise GTCompileError(
            f"only_labelled_logits: expected labels, {POSITIONS} and {TARGETS} together in the batch, but "
            f"{key} is missing. With label_smoothing_factor or compute_loss_func, the Trainer removes labels"
        )
    return value


def _causal_model(model: nn.Module) -> nn.Module:
    """Return the causal language model of transformers that a model is or contains.

    Its loss takes the shifted labels as an argument of its own, which is what makes a selection possible.
    """
    inner: Any = unwrap(model)
    base: Any = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    takes_targets = "shift_labels" in inspect.signature(getattr(base, "loss_function", len)).parameters
    decodes_only = not getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    if isinstance(base, nn.Module) and isinstance(head, nn.Module) and takes_targets and decodes_only:
        return base
    raise GTCompileError(
        f"only_labelled_logits: expected a causal language model of transformers, with an output embedding "
        f"and a loss_function that takes shift_labels; {type(base).__name__} is none"
    )
