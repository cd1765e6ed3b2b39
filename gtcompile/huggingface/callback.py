"""Adaptive backpropagation in Hugging Face's trainers, as a callback."""

import functools
import inspect
import itertools
import logging
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from gtcompile.compiler.blocks import compile_blocks, find_blocks, uncompile_blocks
from gtcompile.costs.budgets import check_budget
from gtcompile.errors import CaptureError, GTCompileError
from gtcompile.huggingface.compatibility import check_trainer, check_uncompiled, repair_model
from gtcompile.huggingface.trainer_loss import TrainerLoss
from gtcompile.state.optimizer_state import (
    Setting,
    check_setting,
    complete_when_saved,
    forget_state_of_others,
    parameters_with_state,
)
from gtcompile.state.trained_set import train_only
from gtcompile.training.adaptive import AdaptiveBackprop

logger = logging.getLogger(__name__)
Every = int | Literal["epoch"]


class AdaptiveBackpropCallback(TrainerCallback, ExportableState):
    """Has a `transformers.Trainer`, or one derived from it, train what is worth it within a FLOPs budget.

    `Trainer(..., callbacks=[AdaptiveBackpropCallback(0.5)])` is all. When training begins, the model's
    repeated blocks are compiled, or all of it where it has none; then and every epoch, or every so many
    steps, importance is measured on examples of the training data, through the trainer's own collator, loss
    and autocast, and a new set is trained. Costs are those of the model's own loss, so batches must contain
    what it computes one from.
    The choice is logged through the trainer's loggers (`adaptive/...`) and is part of its checkpoints.
    When training ends the model is what it was: uncompiled, everything trainable.

    Args:
        budget_fraction: share of a full step's FLOPs, forward and backward, that a step may take, in (0, 1].
        every: re-select at each "epoch", a pass over the data, or after this many optimizer steps.
        batches: how many batches of the trainer's size importance is measured on, at least 2 (1 with
            `two_pass`). They are drawn anew each time, from the trainer's seed and the step alone; of a
            data set without length, the first ones.
        compiled: whether code is compiled; without, frozen parameters are frozen by `requires_grad_`.
        compiler: what compiles a block's graphs, "inductor" or "eager".
        always: FQNs or shell-style patterns of parameters to train in any case.
        never: FQNs or shell-style patterns of parameters never to train.
        two_pass: measure importance as the paper does, not across batches.
        frozen_state: what becomes of a frozen parameter's optimizer state: "keep", "cpu" or "drop".

    Raises:
        ValueError: for arguments outside these ranges; from `Trainer(...)` or `.train()` for settings that
            would undo it: a second such callback, `torch_compile=True`, a model that is compiled already,
            reentrant checkpointing, DeepSpeed, version 1 of FSDP, several devices in one process; for a
            checkpoint of another model or budget.
        BudgetError: from `.train()` when the budget trains nothing on this model; names the smallest.
    """

    def __init__(
        self,
        budget_fraction: float = 0.5,
        *,
        every: Every = "epoch",
        batches: int = 4,
        compiled: bool = True,
        compiler: str = "inductor",
        always: Iterable[str] = (),
        never: Iterable[str] = (),
        two_pass: bool = False,
        frozen_state: Setting = "keep",
    ) -> None:
        check_budget(budget_fraction)
        if every != "epoch" and not _is_count(every, 1):
            raise ValueError(f'expected every="epoch" or a number of steps of at least 1, got {every!r}')
        if not _is_count(batches, 1 if two_pass else 2):
            raise ValueError(f"expected at least 2 batches, or 1 with two_pass=True, got {batches!r}")
        check_setting(frozen_state)
        if isinstance(always, str) or isinstance(never, str):
            raise TypeError("expected collections of patterns for always and never, got a single string")
        self._terms: dict[str, Any] = {
            **{"budget_fraction": budget_fraction, "every": every, "batches": batches},
            **{"compiled": compiled, "compiler": compiler, "two_pass": two_pass},
            **{"always": list(always), "never": list(never), "frozen_state": frozen_state},
        }
        self._adaptive: AdaptiveBackprop | None = None
        self._model: nn.Module | None = None
        self._trainer: Trainer | None = None
        self._completion: RemovableHandle | None = None
        self._due = self._in_the_middle = False
        self._selected_at = -1
        self._steps, self._spent = 0, 0.0

    @property
    def adaptive(self) -> AdaptiveBackprop:
        """The selections and importances of the present or latest training.

        Raises:
            GTCompileError: before training.
        """
        if self._adaptive is None:
            raise GTCompileError("nothing is selected before training begins; call trainer.train() first")
        return self._adaptive

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse settings that would undo the callback while nothing has been done yet."""
        trainer = self._find_trainer()
        self._check(trainer)
        self._guard(trainer)
        if args.world_size > 1:  # or frozen parameters would get gradients of zero, and train
            args.ddp_find_unused_parameters = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compile the blocks; continue with a checkpoint's trained set where there is one.

        Fires again without an end when `auto_find_batch_size` starts over.
        """
        self._release()
        self._trainer = self._find_trainer()
        self._check(self._trainer)
        model: nn.Module = kwargs["model"]
        repair_model(model)
        self._due, self._in_the_middle = True, False
        self._selected_at, self._steps, self._spent = -1, 0, 0.0
        asked = ("budget_fraction", "always", "never", "two_pass", "frozen_state")
        terms = {name: self._terms[name] for name in asked}
        wrapped: Any = self._trainer.model_wrapped
        replicated = wrapped if isinstance(wrapped, DistributedDataParallel) else model
        self._adaptive = AdaptiveBackprop(
            replicated, kwargs["optimizer"], loss_module=TrainerLoss(model, self._trainer), **terms
        )
        if self._terms["compiled"]:
            whole = [""]  # the model is its own only block
            blocks = list(find_blocks(model)) or whole
            compile_blocks(model, blocks=blocks, compiler=self._terms["compiler"])
        self._model = model
        if self._trainer.is_fsdp_enabled:
            self._completion = complete_when_saved(kwargs["optimizer"])
        try:
            self._restore(state)
        except BaseException:
            self._release()
            raise

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch's first step selects anew; where a resumed training begins in the middle of one, none."""
        self._due = self._due or (self._terms["every"] == "epoch" and not self._in_the_middle)
        self._in_the_middle = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Select anew when it is time to."""
        every = self._terms["every"]
        by_steps = every != "epoch" and state.global_step % every == 0
        if (self._due or by_steps) and self._selected_at != state.global_step:
            try:
                self._reselect(args, state, kwargs["train_dataloader"])
            except BaseException:
                self._release()
                raise
        self._due = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count what the step cost."""
        selection = self.adaptive.selection
        assert selection is not None
        self._steps += 1
        self._spent += selection.step_flops / selection.full_flops

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what was spent; leave the model uncompiled, with everything trainable that was before."""
        if self._trainer is not None and self._steps:
            self._trainer.log({"adaptive/flops_fraction_spent": self._spent / self._steps})
        self._release()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON types."""
        progress = {
            **{"torch": torch.__version__, "selected_at": self._selected_at},
            **{"steps": self._steps, "spent": self._spent},
            "adaptive": self._adaptive.state_dict() if self._adaptive and self._selected_at >= 0 else None,
            "with_state": self._with_state(),
        }
        return {"args": dict(self._terms), "attributes": {"progress": progress}}

    def _with_state(self) -> list[str] | None:
        """FQNs that the optimizer has a state for, where the saved one is completed."""
        return None if self._completion is None else parameters_with_state(*self._trained_by())

    def _trained_by(self) -> tuple[nn.Module, Optimizer]:
        assert self._model is not None
        assert self._trainer is not None
        assert self._trainer.optimizer is not None
        return self._model, self._trainer.optimizer

    def _reselect(self, args: TrainingArguments, state: TrainerState, loader: Any) -> None:
        if self._model is None or self._trainer is None:
            raise GTCompileError(
                f"another training took this {type(self).__name__} over; give each trainer its own"
            )
        self._model.train()  # as the step that follows; an evaluation may lie before it
        size = state.train_batch_size or args.train_batch_size
        seed = f"{args.seed} {state.global_step}" + (f" {args.process_index}" if args.world_size > 1 else "")
        drawn = _draw_batches(loader, self._terms["batches"], size, seed)
        trainer = self._trainer
        batches = ({**trainer._prepare_inputs(batch)} for batch in drawn)
        try:
            selection = self.adaptive.reselect(batches)
        except CaptureError as error:
            raise CaptureError(
                f"costs are those of the model's own loss on this trainer's batches: {error}"
            ) from error
        self._selected_at = state.global_step
        logger.info("step %d: %s", state.global_step, selection)
        importance = {
            f"adaptive/importance/{fqn}": self.adaptive.importance[fqn]
            for fqn in sorted(selection.trained & self.adaptive.importance.keys())
        }
        numbers = {
            "adaptive/trained_parameters": len(selection.trained),
            "adaptive/selectable_parameters": selection.selectable,
            "adaptive/flops_fraction": selection.step_flops / selection.full_flops,
            "adaptive/importance": selection.importance,
            **importance,
        }
        if self._steps:
            numbers["adaptive/flops_fraction_spent"] = self._spent / self._steps
        trainer.log(numbers)

    def _restore(self, state: TrainerState) -> None:
        """Continue from what a resumed trainer's state says, which it keeps by the callback's class name."""
        stored: Any = state.stateful_callbacks
        saved = stored.setdefault(type(self).__name__, self.state())  # its own for a checkpoint without it
        saved = saved[0] if isinstance(saved, list) else saved
        progress = saved.get("attributes", {}).get("progress")
        if state.global_step == 0 or progress is None or progress["adaptive"] is None:
            return
        changed = [name for name, value in self._terms.items() if saved["args"][name] != value]
        changed = [name for name in changed if name not in ("compiled", "compiler")]
        if changed:
            name = changed[0]
            raise ValueError(
                f"the checkpoint was trained with {name}={saved['args'][name]!r}, this callback has "
                f"{self._terms[name]!r}; resume with the checkpoint's, or start a new training"
            )
        if progress["torch"] != torch.__version__:
            logger.warning(
                "resumed with torch %s, saved with %s: the continuation may differ in rounding",
                *(torch.__version__, progress["torch"]),
            )
        if (kept := progress.get("with_state")) is not None:
            forget_state_of_others(*self._trained_by(), kept)
        self.adaptive.load_state_dict(progress["adaptive"])
        self._selected_at, self._due = progress["selected_at"], False
        self._in_the_middle = not float(state.epoch or 0).is_integer()
        self._steps, self._spent = progress["steps"], progress["spent"]

    def _release(self) -> None:
        """Leave the model as it was before training."""
        if self._model is not None:
            if self._terms["compiled"]:
                uncompile_blocks(self._model)
            train_only(self._model, None)
        if self._completion is not None:
            self._completion.remove()
        self._model = self._completion = self._trainer = None

    def _check(self, trainer: Trainer) -> None:
        check_trainer(trainer, type(self))
        if self._terms["compiled"]:
            check_uncompiled(trainer, type(self))

    def _guard(self, trainer: Trainer) -> None:
        """Have a training that fails or is interrupted leave the model as one that ends; no event says so."""
        train = trainer.train

        @functools.wraps(train)
        def guarded(*args: Any, **kwargs: Any) -> TrainOutput:
            try:
                return train(*args, **kwargs)
            finally:
                if self._trainer is trainer:
                    self._release()

        trainer.train = guarded  # type: ignore[method-assign]

    def _find_trainer(self) -> Trainer:
        """The trainer this event comes from: it calls us, and hands us everything but itself.

        Its loss can be had in no other way without a second line in the user's script.
        """
        frame = inspect.currentframe()
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, Trainer) and any(c is self for c in owner.callback_handler.callbacks):
                return owner
            frame = frame.f_back
        raise GTCompileError(
            f"{type(self).__name__} needs the transformers.Trainer it belongs to and was called by something "
            f"else; in a loop of your own use gtcompile.AdaptiveBackprop"
        )


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _draw_batches(loader: Any, count: int, size: int, seed: str) -> Iterator[dict[str, Any]]:
    """`count` collated batches of up to `size` examples of the loader's data set.

    Raises:
        ValueError: with fewer examples than batches, or for data that would be used up.
        TypeError: when what the collator makes is no dictionary.
    """
    data = loader.dataset
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        length = len(data)
        chosen = random.Random(seed).sample(range(length), min(length, count * size))
        examples = [data[index] for index in chosen]
    elif iter(data) is iter(data):
        raise ValueError(
            f"{type(data).__name__}.__iter__ goes on where it was, and measuring importance would take "
            f"examples from the training; have it begin anew at each call"
        )
    else:
        examples = list(itertools.islice(iter(data), count * size))
    if len(examples) < count:
        raise ValueError(
            f"expected at least {count} training examples to measure importance on, got {len(examples)}"
        )
    share = min(size, len(examples) // count)
    for start in range(0, count * share, share):
        batch = loader.collate_fn(examples[start : start + share])
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"expected the trainer's collator to make a dictionary that the model takes, got a "
                f"{type(batch).__name__}; trainers that make their batches later, as TRL's GRPOTrainer does, "
                f"are not supported"
            )
        yield {**batch}
