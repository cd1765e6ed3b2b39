"""Trains a fully sharded model on all ranks and a whole one in each process; fails if they differ.

`torchrun --nproc-per-node 2 -m tests.ranks.fully_sharded_run CASE`. A case is words joined by dashes:
`plain`, `eager` or `inductor`, then any of `accumulate`, `bf16`, `offload`, `hybrid`, `early` (compiled
before it is sharded) and `root` (sharded as one module, with a trainer's loss).
"""

import contextlib
import copy
import random
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from transformers import OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from gtcompile import (
    AdaptiveBackprop,
    backward_costs,
    compile_blocks,
    measure_importance,
    train_only,
    trained_parameters,
)
from gtcompile.compiler.blocks import find_blocks
from gtcompile.distributed.fsdp import local
from gtcompile.huggingface.trainer_loss import TrainerLoss
from tests.ranks.data_parallel_run import build, draw
from tests.ranks.gloo_ranks import gloo_ranks
from tests.support.models import captures, random_sets

ROUNDS, STEPS, CLIP = 5, 3, 0.5
Batch = dict[str, torch.Tensor]


class Collective:
    """Counts the calls of a collective and the bytes it is given, by standing in for it.

    Args:
        name: `reduce_scatter` or `all_gather`, in whichever version of its name this torch has.
    """

    def __init__(self, name: str) -> None:
        old = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}[name]
        name = f"{name}_single" if hasattr(dist, f"{name}_single") else old
        self.calls, self.bytes, self._inner = 0, 0, getattr(dist, name)
        setattr(dist, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if (tensor := kwargs.get("input")) is not None:
            self.bytes += tensor.numel() * tensor.element_size()
        return self._inner(*args, **kwargs)


def shard(model: nn.Module, words: set[str]) -> nn.Module:
    """Shard every block, then the rest, or all as one."""
    ranks = dist.get_world_size()
    shape = {"replicate": 2, "shard": ranks // 2} if "hybrid" in words else {"shard": ranks}
    settings = {"mesh": init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))}
    if "bf16" in words:
        settings["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    if "offload" in words:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for layer in () if "root" in words else model.layers:
        fully_shard(layer, **settings)
    return fully_shard(model, **settings)


def trainer_loss() -> TrainerLoss:
    """The model's loss as a trainer computes it."""
    trainer = SimpleNamespace(
        state=None,
        compute_loss=lambda model, batch: model(**batch),
        compute_loss_context_manager=contextlib.nullcontext,
    )
    return TrainerLoss(trainer)


def prepare(words: set[str]) -> nn.Module:
    """A model sharded and compiled as the words say."""
    model = build()
    compiler = next(iter(words & {"eager", "inductor"}), None)
    if compiler and "early" in words:
        compile_blocks(model, compiler=compiler)
    shard(model, words)
    if compiler and "early" not in words:
        compile_blocks(model, compiler=compiler)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor()


def joined(batches: list[Batch]) -> Batch:
    """All ranks' batches as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def trained_bytes(model: nn.Module, ranks: int) -> int:
    """Bytes of the trained gradients, their rows filled up to as many on every rank."""
    names = trained_parameters(model)
    trained = [p for n, p in model.named_parameters() if n in names]
    return sum(-(-len(p) // ranks) * ranks * p[0].numel() * p.element_size() for p in trained)


def step_sharded(model: nn.Module, batches: list[Batch]) -> None:
    """Forward and backward of several batches, gradients sent with the last."""
    for number, batch in enumerate(batches, 1):
        model.set_requires_gradient_sync(number == len(batches))
        model(**batch).backward()


def check_training(words: set[str]) -> None:
    """The same sets and batches in one process: the same weights; frozen ones stay; bytes are counted.

    Weights are compared as torch's full state dictionary has them, after every stretch.
    """
    rank, ranks, parts = dist.get_rank(), dist.get_world_size(), 2 if "accumulate" in words else 1
    close = {"rtol": 0.1, "atol": 0.02} if "bf16" in words else {"rtol": 1e-4, "atol": 1e-6}
    sent, model, alone = Collective("reduce_scatter"), prepare(words), build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    own_loss = trainer_loss() if "root" in words else None
    adaptive = AdaptiveBackprop(model, optimizer, 0.6, loss_fn=own_loss)
    alone_optimizer = torch.optim.AdamW(alone.parameters(), lr=1e-2)
    costs = backward_costs(build(), draw(0, 0, ranks)[rank])
    sets, first = [], 0
    for number in range(ROUNDS):
        drawn = [draw(number, 90 + i, ranks) for i in range(2)]
        selection = adaptive.reselect([batches[rank] for batches in drawn])
        sets.append(selection.trained)
        assert selection.step_flops == costs.step_flops(selection.trained)
        expected = measure_importance(
            alone, alone_optimizer, map(joined, drawn), only=adaptive.importance.keys()
        )
        if "bf16" not in words:
            torch.testing.assert_close(dict(adaptive.importance), expected, rtol=1e-3, atol=1e-6)
        train_only(alone, selection.trained)
        before = {n: local(p).clone() for n, p in model.named_parameters() if n not in selection.trained}
        for step in range(STEPS):
            sent.bytes = 0
            batches = [draw(number, parts * step + part, ranks) for part in range(parts)]
            step_sharded(model, [each[rank] for each in batches])
            for each in batches:
                alone(**joined(each)).backward()
            if "hybrid" not in words:  # which adds up replicas in another way than shards
                assert sent.bytes == trained_bytes(model, ranks), sent.bytes
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            assert gradients.keys() == selection.trained, gradients.keys() ^ selection.trained
            for name, gradient in gradients.items():
                torch.testing.assert_close(whole(gradient), alone.get_parameter(name).grad, **close)
            for module, each in ((model, optimizer), (alone, alone_optimizer)):
                nn.utils.clip_grad_norm_(module.parameters(), CLIP)
                each.step()
                each.zero_grad()
        for name, value in before.items():
            assert torch.equal(local(model.get_parameter(name)), value), f"the frozen {name} moved"
        with torch.no_grad():  # leaves the root's parameters whole
            model(**draw(number, 99, ranks)[rank])
        if "bf16" not in words:
            saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
            torch.testing.assert_close(saved, dict(alone.state_dict()), rtol=1e-3, atol=1e-5)
        first = first or captures()
    assert captures() == first, "a later set captured something"
    assert len(set(sets)) > 1, "every selection was the same"


def check_a_bad_batch() -> None:
    """A loss that is not finite on one rank: the batch counts on no rank."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = prepare({"eager"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    drawn = [draw(0, i, ranks) for i in range(3)]
    expected = measure_importance(model, optimizer, [drawn[0][rank], drawn[2][rank]])
    drawn[1][1]["x"].fill_(torch.inf)
    assert measure_importance(model, optimizer, [batches[rank] for batches in drawn]) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


def check_thawing() -> None:
    """What was frozen when training began trains later, in the precision of the policy."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = prepare({"eager", "bf16"})
    train_only(model, ["layers.3.*"])
    model(**draw(0, 0, ranks)[rank]).backward()
    assert trained_parameters(model) == {n for n, p in model.named_parameters() if p.grad is not None}
    train_only(model, None)
    model(**draw(0, 1, ranks)[rank]).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def check_refusal() -> None:
    """All ranks get the error."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = prepare({"plain"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    adaptive = AdaptiveBackprop(model, optimizer, 0.6 if rank else 0.5)
    try:
        adaptive.reselect([draw(0, i, ranks)[rank] for i in range(2)])
    except ValueError as error:
        print(f"rank {rank}: {error}", flush=True)
    else:
        raise AssertionError("nothing was refused")


def change_sets(count: int = 300) -> None:
    """A random set at every step, with ranks out of step; a frozen prefix is not gathered in the backward."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gathered, delays, model = Collective("all_gather"), random.Random(rank), prepare({"eager"})
    names = sorted(name for name in trained_parameters(model) if name.startswith("layers."))
    for number, chosen in enumerate(random_sets(names, count)):
        lowest = number % 4
        chosen = frozenset(name for name in chosen if name >= f"layers.{lowest}") or frozenset(names[-1:])
        train_only(model, chosen)
        loss = model(**draw(0, number, ranks)[rank])
        gathered.calls = 0
        time.sleep(delays.choice((0.0, 0.01)))
        loss.backward()
        assert gathered.calls <= 4 - lowest + 1, "more than torch's prefetching of one block"
        assert chosen == {n for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()


def language_models() -> Iterator[nn.Module]:
    """A decoder with tied weights and an encoder-decoder, without and with activation checkpointing."""
    sizes = {"vocab_size": 64, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_ff": 24, "d_kv": 8}
    opt = {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}
    opt |= {"num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 32}
    for checkpointing in (False, True):
        for model in (
            OPTForCausalLM(OPTConfig(vocab_size=64, **opt)),
            T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0)),
        ):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.config.use_cache = False
            yield model.train()


def draw_tokens(number: int, ranks: int) -> list[Batch]:
    """One batch per rank."""
    rows = torch.randint(3, 64, (ranks, 2, 12), generator=torch.Generator().manual_seed(number))
    return [{"input_ids": part, "labels": part} for part in rows]


def check_language_models() -> None:
    """Models of transformers: gradients of all ranks together are those of one process."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    torch.manual_seed(0)
    for model in language_models():
        alone = copy.deepcopy(model)
        for name in list(find_blocks(model)):
            fully_shard(model.get_submodule(name), mesh=mesh)
        compile_blocks(fully_shard(model, mesh=mesh), compiler="eager")
        adaptive = AdaptiveBackprop(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0.6)
        for number in range(3):
            selection = adaptive.reselect([draw_tokens(10 * number + i, ranks)[rank] for i in range(2)])
            train_only(alone, selection.trained)
            batches = draw_tokens(99 + number, ranks)
            model(**batches[rank]).loss.backward()
            alone(**joined(batches)).loss.backward()
            gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
            expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
            torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
            model.zero_grad()
            alone.zero_grad()


CASES = {
    "language": check_language_models,
    "sets": change_sets,
    "nan": check_a_bad_batch,
    "thaw": check_thawing,
    "budget": check_refusal,
}


if __name__ == "__main__":
    with gloo_ranks():
        for case in sys.argv[1:]:
            CASES.get(case, lambda case=case: check_training(set(case.split("-"))))()
