"""Hoisted variants: nothing kept for frozen parameters, nothing computed for them, nothing overwritten."""

import functools
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gtcompile import CaptureError, backward_costs, compile_blocks, train_only, trained_parameters
from gtcompile.compiler import backward_plans, inductor
from gtcompile.compiler.backward_plans import BackwardPlans
from gtcompile.testing import assert_same_gradients, reference_gradients
from gtcompile.tools.bench.baselines import compilations
from gtcompile.torch_internals import compile_fx_inner
from tests.support.models import (
    BATCH,
    LENGTH,
    WIDTH,
    Recipe,
    Regression,
    ResidualMLP,
    Stack,
    block_recipes,
    captures,
    counted_step,
    forget_captures,
    make_batch,
    random_sets,
    recipes,
    selectable,
    step,
    trained_sets,
)

BATCH_NORM = frozenset({"convolution"})
"""A graph returns the new running statistics, where eager PyTorch writes them in place: a few bytes more."""
ACTIVATION = (BATCH, LENGTH, WIDTH)


def compiled(model, compiler="eager", **options):
    options = {"compiler": compiler, "variants": "hoisted"} | options
    return torch.compile(model, backend="gtcompile", options=options)


class WeakRecorder(TorchDispatchMode):
    """Weak references to everything operators return, in compiled regions too."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[weakref.ref[torch.Tensor]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.references.append(weakref.ref(value))
        return result

    def __enter__(self):
        gc.freeze()  # what is there already is not looked at again, which takes half a second
        return super().__enter__()

    def survivors(self) -> list[torch.Tensor]:
        gc.collect()
        return [tensor for tensor in (reference() for reference in self.references) if tensor is not None]


def bytes_alive(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[int, list[tuple[int, ...]]]:
    """Bytes of what a forward computed and the graph keeps alive, and the shapes of its tensors."""
    given = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *batch.values()]}
    with WeakRecorder() as recorder:
        loss = model(**batch)
    storages = {
        t.untyped_storage().data_ptr(): t for t in recorder.survivors() if t is not loss and t.numel()
    }
    kept = [tensor for pointer, tensor in storages.items() if pointer not in given]
    return sum(t.untyped_storage().nbytes() for t in kept), [tuple(t.shape) for t in kept]


def bytes_saved(model: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd saves in a forward, parameters and batch aside; generated code included."""
    given = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *batch.values()]}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in given and tensor.numel():
            sizes[pointer] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch)
    assert loss.requires_grad
    return sum(sizes.values())


class Chain(nn.Module):
    """Linear layers in a row: what a layer reads is saved for its own weight's gradient alone."""

    def __init__(self, depth=5):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))

    def forward(self, x, y):
        for layer in self.layers:
            x = layer(x)
        return ((x - y) ** 2).mean()


@pytest.mark.parametrize(
    ("trained", "activations"),
    [
        (["layers.0.weight"], 0),  # reads the batch itself
        (["layers.0.bias", "layers.3.bias"], 0),
        (["layers.1.weight"], 1),
        (["layers.1.weight", "layers.3.weight", "layers.4.bias"], 2),
        (None, 4),
    ],
    ids=str,
)
def test_no_value_saved_only_for_frozen_parameters_survives_the_forward(trained, activations):
    model, batch = Chain(), make_batch()
    run = compiled(model)
    step(run, batch)
    train_only(run, trained)
    _, shapes = bytes_alive(run, batch)
    assert (
        sum(torch.Size(shape).numel() == torch.Size(ACTIVATION).numel() for shape in shapes)
        == activations + 1
    )
    step(run, batch)
    _, again = bytes_alive(run, batch)
    assert again == shapes  # one more is the difference that the loss squares


def test_the_recorder_sees_what_autograd_keeps():
    _, shapes = bytes_alive(Chain(), make_batch())
    assert shapes.count((BATCH * LENGTH, WIDTH)) + shapes.count(ACTIVATION) >= 5


@pytest.mark.slow
@settings(max_examples=5)
@given(recipes(layers=3, without=BATCH_NORM), st.integers(0, 99))
def test_never_more_is_kept_alive_than_by_eager_freezing(recipe, seed):
    forget_captures()
    model, twin, batch = recipe.model(), recipe.model(), recipe.batch()
    run = compiled(model)
    for trained in random_sets(sorted(backward_costs(model, batch).fqns), 3, seed):
        train_only(run, trained)
        train_only(twin, trained)
        assert bytes_alive(run, batch)[0] <= bytes_alive(twin, batch)[0]


def test_a_frozen_prefix_of_blocks_keeps_nothing_alive():
    model, batch = Recipe(("residual",) * 4).model(), make_batch()
    compile_blocks(model, compiler="eager")
    step(model, batch)
    kept = []
    for lowest in range(4):
        train_only(model, [f"layers.{lowest}.*", "layers.3.*"])
        kept.append(bytes_alive(model, batch)[0])
    assert kept == sorted(kept, reverse=True)
    train_only(model, ["head.bias"])
    assert bytes_alive(model, batch)[0] <= 2 * 4 * torch.Size(ACTIVATION).numel()


def test_generated_code_saves_less_when_less_is_trained():
    model, batch = Chain(), make_batch()
    run = compiled(model, compiler="inductor")
    saved = {}
    for trained in (None, ["layers.1.weight", "layers.3.weight"], ["layers.0.bias"]):
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected, rtol=1e-4, atol=1e-6)
        saved[str(trained)] = bytes_saved(run, batch)
    everything, two, none = saved.values()
    activation = 4 * torch.Size(ACTIVATION).numel()
    assert everything - two == 2 * activation
    assert two - none == 2 * activation


def test_after_the_backward_nothing_is_kept():
    model, batch = Regression(4), make_batch()
    run = compiled(model)
    step(run, batch)
    train_only(run, ["layers.1.*", "layers.3.weight"])
    with WeakRecorder() as recorder:
        loss = run(**batch)
        loss.backward()
    gradients = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    left = [t for t in recorder.survivors() if t is not loss and t.numel()]
    assert {t.untyped_storage().data_ptr() for t in left} <= gradients | {loss.untyped_storage().data_ptr()}


def test_each_set_is_planned_once(monkeypatch):
    planned = []
    make_plan = BackwardPlans._make_plan

    def note(plans, live, graph):
        planned.append(live)
        return make_plan(plans, live, graph)

    monkeypatch.setattr(BackwardPlans, "_make_plan", note)
    model, batch = Regression(3), make_batch()
    run = compiled(model)
    sets = random_sets(selectable(model), 4)
    for trained in sets + sets[::-1]:
        train_only(run, trained)
        step(run, batch)
    assert len(planned) == len(set(planned)) == 4


@pytest.mark.parametrize("cut_chains", ["run", "compile"])
def test_generated_code_overwrites_nothing_that_a_leaf_reads(cut_chains):
    model, batch = Recipe(("norm", "residual"), tied=True).model(), make_batch()
    costs = backward_costs(model, batch)
    run = compiled(model, compiler="inductor", cut_chains=cut_chains)
    for trained in random_sets(selectable(model), 3, seed=4):
        train_only(run, trained)
        for _ in range(2):
            expected = reference_gradients(run, batch)
            step(run, batch)
            assert_same_gradients(run, expected, rtol=1e-4, atol=1e-6)
        assert counted_step(run, batch) == costs.step_flops(trained)


@pytest.fixture
def leaves_run(monkeypatch) -> list[int]:
    """How many leaves each run of a compiled chain was followed by, in the order of the runs."""
    runs: list[int] = []

    def run_chain(program, inputs):
        runs.append(len(program.calls))
        return chain_and_leaves(program, inputs)

    chain_and_leaves = backward_plans.run_chain
    monkeypatch.setattr(backward_plans, "run_chain", run_chain)
    return runs


def test_blocks_with_a_frozen_convolution_run_their_compiled_chain(leaves_run):
    model, batch = Recipe(("convolution",) * 3).model(), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model)
    step(model, batch)
    assert leaves_run == [1, 1, 1]
    train_only(model, ["layers.0.conv.*", "layers.1.norm.*", "layers.2.conv.bias"])
    expected = reference_gradients(model, batch)
    flops = counted_step(model, batch)
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert flops == costs.step_flops(trained_parameters(model))
    assert leaves_run[3:] == [0, 0]  # the lowest block needs no more than its own gradients


class Reader(nn.Module):
    """A block that reads a memory, as those of decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = ResidualMLP()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        x = self.mlp(x)
        heads = (self.query(x), self.key(memory), self.value(memory))
        read = nn.functional.scaled_dot_product_attention(*(head.unsqueeze(1) for head in heads))
        return x + read.squeeze(1)


class Readers(nn.Module):
    """A linear encoder whose output two blocks read."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.embed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([Reader(), Reader()])

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        memory, x = self.encoder(x), self.embed(x)
        for layer in self.layers:
            x = layer(x, memory)
        return nn.functional.mse_loss(x, y)


@pytest.mark.parametrize(
    ("trained", "leaves"),
    [
        (["embed.*"], [0, 0]),
        (["embed.*", "encoder.*"], [1, 1]),
        (["encoder.*", "layers.0.query.weight", "layers.1.key.weight"], [2]),  # the lower block's x is frozen
    ],
)
def test_the_gradient_of_a_memory_that_blocks_read_is_a_leaf(trained, leaves, leaves_run):
    torch.manual_seed(0)
    model, batch = Readers(), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model)
    step(model, batch)
    assert leaves_run == [6, 6]  # five weights, and the memory
    compiled = compilations()
    train_only(model, trained)
    expected = reference_gradients(model, batch)
    flops = counted_step(model, batch)
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert flops == costs.step_flops(trained_parameters(model))
    assert compilations() == compiled
    assert leaves_run[2:] == leaves


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_a_retained_graph_gives_the_same_gradients_again(compiler, steps_before):
    model, batch = Recipe(("norm",) * 2).model(), make_batch()
    compile_blocks(model, compiler=compiler)
    train_only(model, ["layers.*.weight"])
    for _ in range(steps_before):
        step(model, batch)
    expected = reference_gradients(model, batch)
    loss = model(**batch)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_dropout_in_generated_code_draws_the_same_for_every_set():
    model, batch = Recipe(("dropout",) * 2).model(), make_batch()
    compile_blocks(model)
    everything = None
    for trained in [None, *random_sets(selectable(model), 4)]:
        train_only(model, trained)
        torch.manual_seed(5)
        loss = step(model, batch)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        everything = everything or (loss, gradients)
        assert torch.equal(loss, everything[0])
        of_these = {name: g for name, g in everything[1].items() if trained is None or name in trained}
        assert_same_gradients(gradients, of_these, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["specialized", "hoisted", "blocks"])
def test_dropout_draws_the_random_numbers_of_eager_pytorch(how, compiler):
    model, batch = Recipe(("dropout",) * 3).model(), make_batch()
    if how == "blocks":
        run = compile_blocks(model, compiler=compiler)
    else:
        run = compiled(model, compiler, variants=how)
    for seed, trained in enumerate([frozenset({"head.bias"}), *random_sets(selectable(model), 2)]):
        train_only(run, trained)
        torch.manual_seed(seed)
        expected = reference_gradients(run, batch)
        model.zero_grad()
        step(run, batch)
        tolerance = 1e-6 if compiler == "inductor" else 0.0
        assert_same_gradients(model, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_checkpointed_block_with_dropout_draws_the_same_again(compiler, reentrant):
    model, batch = Recipe(("dropout",) * 3).model(), make_batch()
    compile_blocks(model, compiler=compiler)
    for layer in model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=reentrant)
    for seed, trained in enumerate(random_sets(selectable(model), 3)):
        train_only(model, trained | {"embed.weight"})
        torch.manual_seed(seed)
        expected = reference_gradients(model, batch)
        model.zero_grad()
        step(model, batch)
        tolerance = 1e-6 if compiler == "inductor" else 0.0
        assert_same_gradients(model, expected, rtol=tolerance, atol=tolerance)


class Shrinking(nn.Module):
    """Blocks that each see a sequence a quarter as long as the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 4, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv1d(4, 4, 4, stride=4), nn.GELU()) for _ in range(2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.square().mean()


@pytest.mark.slow
def test_sizes_that_code_from_the_disk_holds_for_are_guarded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    batch = {"inputs": torch.randn(2, 4, 319)}
    for _ in range(2):  # the second time the code is there
        forget_captures()
        model = compile_blocks(Shrinking())
        train_only(model, ["stem.*"])
        for _ in range(2):
            expected = reference_gradients(model, batch)
            model(**batch).backward()
            assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
            model.zero_grad()


def test_the_compilers_own_random_numbers_can_be_asked_for():
    model, batch = Recipe(("dropout",) * 2).model(), make_batch()
    run = compiled(model, "inductor", random="compiler")
    torch.manual_seed(0)
    own = step(run, batch)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(own, model(**batch))


class CheckpointedInside(Stack):
    """Checkpointing that Dynamo sees: the partitioner has to recompute."""

    def forward(self, x, y):
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return ((self.head(x) - y) ** 2).mean()


def test_checkpointing_inside_a_region_recomputes_and_is_trained_right():
    recipe = Recipe(("residual", "norm"))
    layers = list(recipe.model().layers)
    model, batch = CheckpointedInside(layers, tied=False), make_batch()
    run = compiled(model)
    kept = {}
    for trained in [None, *random_sets(selectable(model), 4)]:
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        step(run, batch)
        assert_same_gradients(run, expected)
        kept[trained] = bytes_alive(run, batch)[0]
    assert captures() == 1
    plain = Stack(layers, tied=False)
    step(run_plain := compiled(plain), batch)
    train_only(run, None)
    assert bytes_alive(run, batch)[0] < bytes_alive(run_plain, batch)[0]


def gradients_with(
    make: Callable[[nn.Module], nn.Module], recipe: Recipe, trained
) -> dict[str, torch.Tensor]:
    model = recipe.model()
    run = make(model)
    train_only(run, trained)
    torch.manual_seed(3)
    step(run, recipe.batch())
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=4)
@given(block_recipes(), st.data())
def test_hoisted_and_specialized_agree_whole_and_in_blocks(recipe, data):
    trained = data.draw(trained_sets(selectable(recipe.model()))) | {"head.bias"}
    found = []
    for variants in ("hoisted", "specialized"):
        options = {"compiler": "eager", "variants": variants}
        forget_captures()
        found.append(gradients_with(lambda model: compiled(model, **options), recipe, trained))  # noqa: B023
        forget_captures()
        found.append(gradients_with(lambda model: compile_blocks(model, **options), recipe, trained))  # noqa: B023
    for gradients in found[1:]:
        assert_same_gradients(gradients, found[0])


@torch.library.custom_op("gtcompile_tests::product", mutates_args=())
def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A product of matrices for which there is no FLOP formula."""
    return x @ y


@product.register_fake
def _(x, y):
    return x.new_empty(x.shape[0], y.shape[1])


def product_backward(ctx, gradient):
    x, y = ctx.saved_tensors
    return product(gradient, y.t()), product(x.t(), gradient)


product.register_autograd(
    product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Scores(nn.Module):
    """Compares what a layer returns with codes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.codes = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return product(torch.tanh(self.linear(x)), self.codes).square().mean()


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_training_needs_no_flop_formula(compiler):
    model, batch = Scores(), {"x": torch.randn(4, WIDTH)}
    with pytest.raises(CaptureError, match=r"gtcompile_tests.*product"):
        backward_costs(model, batch)
    run = compiled(model, compiler)
    for trained in (None, ["codes"], ["linear.bias"]):
        train_only(run, trained)
        expected = reference_gradients(run, batch)
        model.zero_grad()
        run(**batch).backward()
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)


def test_inductor_is_never_told_that_a_tangent_has_a_fixed_address(monkeypatch):
    told: list[tuple[list[str], list[int]]] = []

    def note(module, example_inputs, **options):
        names = [node.name for node in module.graph.find_nodes(op="placeholder")]
        told.append((names, list(options["static_input_idxs"])))
        return compile_fx_inner(module, example_inputs, **options)

    monkeypatch.setattr(inductor, "compile_fx_inner", note)
    model, batch = Recipe(("residual",) * 2).model(), make_batch()
    compile_blocks(model, cut_chains="compile")
    step(model, batch)
    train_only(model, ["layers.0.up.weight", "layers.1.down.bias"])
    step(model, batch)
    assert len(told) > 1
    for names, fixed in told:
        assert [name for name in names if not name.startswith("tangents")] == [names[i] for i in fixed]
        assert len(fixed) < len(names)


SECOND_RUN = """
from gtcompile import compile_blocks, train_only
from gtcompile.torch_internals import dynamo_counters
from tests.support.models import Recipe, make_batch, step
model, batch = Recipe(("norm",) * 3).model(), make_batch()
compile_blocks(model)
for trained in (None, ["layers.1.*"], ["layers.2.norm.*"]):
    train_only(model, trained)
    step(model, batch)
counters = dynamo_counters["inductor"]
print(counters["fxgraph_cache_miss"], counters["fxgraph_cache_hit"])
"""


@pytest.mark.slow
def test_a_second_run_compiles_nothing_new(tmp_path):
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SECOND_RUN]
    runs = [subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2)]
    assert [run.stdout.split() for run in runs] == [["3", "0"], ["0", "3"]], runs[-1].stderr
