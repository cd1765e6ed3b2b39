"""compile_blocks: which modules are blocks, one capture for all of them, and a new set for free."""

import copy
import pickle

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gtcompile import backward_costs, compile_blocks, train_only, trained_parameters, uncompile_blocks
from gtcompile.capture.pristine_model import uses_compiled_code
from gtcompile.compiler.backward_plans import BackwardGraph, Plan
from gtcompile.compiler.blocks import find_blocks
from gtcompile.compiler.hoisted import HoistedVariants
from gtcompile.compiler.operator_program import run_operators
from gtcompile.graph.flops import count_flops
from gtcompile.graph.joint_graph import copy_module
from gtcompile.testing import assert_same_gradients, reference_gradients
from gtcompile.tools.bench.baselines import Compilations, compilations
from gtcompile.torch_internals import TorchDynamoException
from tests.support.models import (
    RANDOM_LAYERS,
    WIDTH,
    Dropped,
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
    selectable,
    step,
)

VARIANTS = pytest.mark.parametrize("variants", ["specialized", "hoisted"])
ATTENTION = Recipe(("attention",) * 4)


def check_step(model, batch) -> None:
    expected = reference_gradients(model, batch)
    step(model, batch)
    assert_same_gradients(model, expected)


@settings(max_examples=7)
@given(block_recipes(), st.sampled_from(["specialized", "hoisted"]), st.integers(0, 99))
def test_gradients_and_flops_are_those_of_eager_freezing(recipe, variants, seed):
    forget_captures()
    model, batch = recipe.model(), recipe.batch()
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager", variants=variants)
    for trained in random_sets(sorted(costs.fqns), 4, seed):
        train_only(model, trained)
        check_step(model, batch)
        assert counted_step(model, batch) == costs.step_flops(trained)


@settings(max_examples=1)
@given(st.just(Recipe(("attention", "branches") * 2, tied=True)), st.integers(0, 99))
def test_gradients_of_generated_code_are_those_of_eager_freezing(recipe, seed):
    check_generated_code(recipe, seed)


@pytest.mark.long
@settings(max_examples=5)
@given(block_recipes(without=RANDOM_LAYERS), st.integers(0, 99))
def test_gradients_of_generated_code_are_those_of_eager_freezing_on_random_models(recipe, seed):
    check_generated_code(recipe, seed)


def check_generated_code(recipe, seed):
    forget_captures()
    model, batch = recipe.model(), recipe.batch()
    compile_blocks(model)
    for trained in random_sets(selectable(model), 5, seed):
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        step(model, batch)
        assert_same_gradients(model, expected, rtol=1e-3, atol=1e-5)


def test_generated_code_serves_many_sets_with_one_capture_and_exact_flops():
    model, batch = Recipe(("norm",) * 3).model(), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model)
    before = captures()
    for trained in random_sets(selectable(model), 8):
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        step(model, batch)
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
        assert counted_step(model, batch) == costs.step_flops(trained)
    assert captures() == before + 1


def test_a_soak_of_random_sets_captures_nothing_after_the_first_steps():
    model, batch = Recipe(("attention", "branches") * 3, tied=True).model(), make_batch()
    compile_blocks(model, compiler="eager")
    step(model, batch)
    first = captures()
    for number, trained in enumerate(random_sets(selectable(model), 60, seed=7)):
        train_only(model, trained)
        if number % 10 == 0:
            with torch.no_grad():
                model.eval()(**batch)
            model.train()
        check_step(model, batch)
    assert captures() == first == 2  # one for each kind of block


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_a_new_set_makes_no_graph_and_generates_no_code(compiler, monkeypatch):
    made = []

    def counted(whole):
        def count(*args, **kwargs):
            made.append(whole)
            return whole(*args, **kwargs)

        return count

    for kind, name in ((fx.Graph, "__init__"), (fx.GraphModule, "recompile")):
        monkeypatch.setattr(kind, name, counted(getattr(kind, name)))
    model, batch = Recipe(("norm",) * 3).model(), make_batch()
    compile_blocks(model, compiler=compiler)
    step(model, batch)
    assert made  # the first step is seen to make some
    made.clear()
    for trained in [["layers.0.*"], ["layers.2.*"], *random_sets(selectable(model), 20, seed=3)]:
        train_only(model, trained)
        step(model, batch)
    assert not made


@pytest.mark.parametrize("first", [["layers.2.*"], ["head.*"]])
def test_nothing_is_compiled_for_a_set_that_reaches_deeper_than_the_first(first):
    model, batch = Recipe(("norm",) * 3).model(), make_batch()
    compile_blocks(model)
    train_only(model, first)
    step(model, batch)
    before = compilations()
    train_only(model, None)
    expected = reference_gradients(model, batch)
    step(model, batch)
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert compilations() - before == Compilations(captures=0, compiled=0)


def test_the_first_set_may_leave_any_prefix_frozen():
    for last in range(4):
        forget_captures()
        model, batch = ATTENTION.model(), ATTENTION.batch()
        train_only(model, [f"layers.{last}.*"])
        compile_blocks(model, compiler="eager")
        check_step(model, batch)
        train_only(model, None)
        check_step(model, batch)
        assert captures() <= 2


def test_depth_costs_no_captures():
    counts = []
    for depth in (2, 6):
        forget_captures()
        model = compile_blocks(Recipe(("attention",) * depth).model(), compiler="eager")
        step(model, make_batch())
        counts.append(captures())
    assert counts == [1, 1]


def test_a_frozen_prefix_runs_no_backward():
    model, batch = ATTENTION.model(), ATTENTION.batch()
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager")
    for pattern in ("layers.3.mlp.down.weight", "layers.2.out.bias", "head.bias", "embed.weight"):
        train_only(model, [pattern])
        check_step(model, batch)
        with count_flops() as counter:
            loss = model(**batch)
        forward = counter.get_total_flops()
        with count_flops() as counter:
            loss.backward()
        assert forward == costs.forward_flops
        assert counter.get_total_flops() == costs.step_flops([pattern]) - costs.forward_flops


class Checkpointed(Stack):
    """Activations of every layer are thrown away and computed again in the backward."""

    def forward(self, x, y):
        x = self.embed(x)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return ((self.head(x) - y) ** 2).mean()


@VARIANTS
@pytest.mark.parametrize("kind", [ResidualMLP, lambda: Dropped(0.3)], ids=["residual", "dropout"])
def test_checkpointed_blocks_are_trained_right(variants, kind):
    model, batch = Checkpointed([kind() for _ in range(3)], tied=False), make_batch()
    compile_blocks(model, compiler="eager", variants=variants)
    for trained in random_sets(selectable(model), 8):
        train_only(model, trained)
        check_step(model, batch)


@VARIANTS
@pytest.mark.parametrize("lowest", range(3))
def test_checkpointed_blocks_repeat_their_first_step_as_they_ran_it(variants, lowest):
    model, batch = Checkpointed([Dropped(0.3) for _ in range(3)], tied=False), make_batch()
    train_only(model, [f"layers.{lowest}.linear.weight"])
    compile_blocks(model, compiler="eager", variants=variants)
    for trained in ([f"layers.{lowest}.linear.bias"], None, ["layers.2.linear.bias"]):
        train_only(model, trained)
        check_step(model, batch)


@VARIANTS
def test_blocks_that_the_user_froze_altogether_run_without_autograd(variants):
    model, batch = Recipe(("norm",) * 3).model(), make_batch()
    for module in (model.embed, model.layers[0]):
        module.requires_grad_(False)
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager", variants=variants)
    for trained in random_sets(sorted(costs.fqns), 4):
        train_only(model, trained)
        check_step(model, batch)
        assert counted_step(model, batch) == costs.step_flops(trained)


def test_evaluation_compiles_nothing_and_gives_the_same_values():
    model, batch = Recipe(("convolution", "convolution")).model().eval(), make_batch()
    with torch.no_grad():
        expected = model(**batch)
        compile_blocks(model, compiler="eager")
        assert torch.equal(model(**batch), expected)
    assert captures() == 0


@VARIANTS
def test_the_eager_rest_is_frozen_by_requires_grad(variants):
    model = compile_blocks(Recipe(("norm", "norm")).model(), compiler="eager", variants=variants)
    train_only(model, ["layers.0.linear.weight", "head.weight"])
    require_grad = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in require_grad if not name.startswith("layers.")} == {"head.weight"}
    assert {name for name in selectable(model) if name.startswith("layers.")} <= require_grad


def test_batch_norm_statistics_follow_those_of_eager_training():
    recipe = Recipe(("convolution", "convolution"))
    model, twin = recipe.model(), recipe.model()
    compile_blocks(model, compiler="eager")
    for trained in random_sets(selectable(model), 4):
        train_only(model, trained)
        step(model, recipe.batch())
        step(twin, recipe.batch())
    buffers = zip(model.buffers(), twin.buffers(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in buffers)


SMALL = {"vocab_size": 50, "num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32}


def small_t5():
    return T5ForConditionalGeneration(T5Config(**SMALL, dropout_rate=0.0, decoder_start_token_id=0))


def small_opt():
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=50, num_hidden_layers=3, num_attention_heads=2, **sizes))


class Experts(nn.Module):
    """Repeated modules inside a block belong to the block."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(ResidualMLP() for _ in range(3))

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


class MixtureBlock(nn.Module):
    """A block with experts, as language models arrange them."""

    def __init__(self):
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(WIDTH), Experts()

    def forward(self, x):
        return x + self.mixture(self.norm(x))


@pytest.mark.parametrize(
    ("build", "blocks"),
    [
        (lambda: Recipe(("norm", "norm", "residual", "residual")).model(), [f"layers.{i}" for i in range(4)]),
        (small_opt, [f"model.decoder.layers.{i}" for i in range(3)]),
        (small_t5, ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
        (lambda: nn.Sequential(MixtureBlock(), MixtureBlock()), ["0", "1"]),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []),
    ],
    ids=["two kinds", "opt", "t5", "experts inside", "linear layers"],
)
def test_repeated_blocks_are_found(build, blocks):
    assert list(find_blocks(build())) == blocks


def test_a_language_model_is_trained_right_block_by_block():
    model = small_opt()
    tokens = torch.randint(3, 50, (2, 7))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager")
    for trained in random_sets(sorted(costs.fqns), 5):
        train_only(model, trained)
        check_step(model, batch)
        assert counted_step(model, batch) == costs.step_flops(trained)


class Breaking(nn.Module):
    """Graph breaks leave regions that return a view of their input alone, or integers."""

    def __init__(self):
        super().__init__()
        self.router, self.linear = nn.Linear(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        rows = x.flatten(0, 1)
        torch._dynamo.graph_break()
        chosen = self.router(rows).topk(1).indices
        if int(chosen.sum()) >= 0:
            rows = rows + self.linear(rows)
        weights = torch.softmax(self.router(rows), -1).gather(1, chosen)
        return (rows * weights).view_as(x)


@VARIANTS
def test_a_region_that_returns_nothing_to_differentiate_is_one_of_several(variants):
    model, batch = Stack([Breaking(), Breaking()], tied=False), make_batch()
    compile_blocks(model, compiler="eager", variants=variants)
    for trained in (None, *random_sets(selectable(model), 3)):
        train_only(model, trained)
        check_step(model, batch)


def test_blocks_can_be_named():
    model = compile_blocks(Recipe(("norm", "residual")).model(), blocks=["layers.1"], compiler="eager")
    assert "forward" in vars(model.layers[1])
    assert "forward" not in vars(model.layers[0])
    check_step(model, make_batch())


def test_the_model_comes_back():
    model = Recipe(("norm", "norm")).model()
    assert compile_blocks(model, compiler="eager") is model


def test_a_model_without_repeated_blocks_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"Regression has no repeated blocks; name them with blocks="):
        compile_blocks(Regression())


def test_a_name_that_is_no_module_is_refused_with_its_neighbours():
    with pytest.raises(ValueError, match=r"has no module 'layer.1'; near names: .*layers.1"):
        compile_blocks(Recipe(("norm", "norm")).model(), blocks=["layer.1"])
    with pytest.raises(TypeError, match=r"got the string 'layers.1'; write \['layers.1'\]"):
        compile_blocks(Recipe(("norm", "norm")).model(), blocks="layers.1")


def test_a_model_compiled_already_is_refused():
    model = compile_blocks(Recipe(("norm", "norm")).model(), compiler="eager")
    with pytest.raises(ValueError, match="compiled already"):
        compile_blocks(model)


def test_a_wrong_option_is_refused_before_anything_changes():
    model = Recipe(("norm", "norm")).model()
    with pytest.raises(ValueError, match="expected one of 'specialized', 'hoisted'"):
        compile_blocks(model, variants="best")
    assert not any("forward" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_its_own_weights_uncompiled_and_can_be_compiled(twin_of, ran):
    model, batch = compile_blocks(ATTENTION.model(), compiler="eager"), ATTENTION.batch()
    if ran:
        step(model, batch)
        model.zero_grad()
    twin = twin_of(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3)
    plain = ATTENTION.model()
    plain.load_state_dict(twin.state_dict())
    for run in (twin, compile_blocks(twin, compiler="eager")):
        assert run(**batch) == plain(**batch)
        check_step(run, batch)
        assert all(parameter.grad is None for parameter in model.parameters())
    uncompile_blocks(twin)
    assert twin(**batch) == plain(**batch)


def test_a_forward_that_the_user_had_replaced_is_costed_and_comes_back():
    model, batch = ATTENTION.model(), ATTENTION.batch()
    block = model.layers[0]
    original = block.forward
    block.forward = replaced = lambda x: 2 * original(original(x))
    costs, loss = backward_costs(model, batch), model(**batch)
    compile_blocks(model, compiler="eager")
    assert backward_costs(model, batch) == costs
    assert model(**batch) == loss
    check_step(model, batch)
    assert uncompile_blocks(model)(**batch) == loss
    assert block.forward is replaced


def test_blocks_can_be_set_free_with_the_same_parameters_trained():
    model, batch = Recipe(("norm", "norm")).model(), make_batch()
    compile_blocks(model, compiler="eager")
    train_only(model, ["layers.1.*", "embed.bias"])
    step(model, batch)
    assert uncompile_blocks(model) is model
    assert not any("forward" in vars(layer) for layer in model.layers)
    assert trained_parameters(model) == {n for n, p in model.named_parameters() if p.requires_grad}
    before = captures()
    check_step(model, batch)
    assert captures() == before
    compile_blocks(model, compiler="eager")
    train_only(model, None)
    check_step(model, batch)


class Repeated(nn.Module):
    """A residual layer applied a number of times, which Dynamo takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.times = nn.Linear(4, 4), 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            x = x + self.linear(x)
        return x


def test_a_block_that_is_captured_again_and_again_is_refused_and_never_run_eagerly(monkeypatch):
    monkeypatch.setattr("gtcompile.compiler.blocks.CAPTURES", 9)  # one more than Dynamo's default limit
    model = compile_blocks(nn.Sequential(Repeated(), Repeated()), compiler="eager")

    def run(times: int) -> None:
        for block in model:
            block.times = times
        model(torch.ones(2, 4, requires_grad=True)).sum().backward()

    for times in range(1, 10):
        run(times)
    assert captures() == 9
    with pytest.raises(TorchDynamoException, match="captured Repeated 9 times"):
        run(10)


def test_another_compiled_model_of_the_same_class_does_not_spend_the_limit():
    other = torch.compile(ResidualMLP(), backend="eager")
    for rows in range(1, 12):  # beyond Dynamo's limit, after which it runs this code eagerly
        other(torch.zeros((1,) * rows + (WIDTH,)))
    model, batch = Stack([ResidualMLP() for _ in range(2)], tied=False), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager")
    train_only(model, ["layers.1.*"])
    before = captures()
    flops = counted_step(model, batch)
    assert captures() == before + 1
    assert flops == costs.step_flops(trained_parameters(model))


class Routed(nn.Module):
    """A block that holds its experts in a list of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.experts = ResidualMLP(), nn.ModuleList(ResidualMLP() for _ in range(2))

    def forward(self, x):
        return sum(expert(self.mixer(x)) for expert in self.experts)


def test_a_block_with_a_list_of_experts_is_one_block():
    assert list(find_blocks(Stack([Routed() for _ in range(2)], tied=False))) == ["layers.0", "layers.1"]


def test_stages_of_blocks_are_looked_into():
    stage = nn.ModuleDict({"blocks": nn.ModuleList(Routed() for _ in range(2))})
    found = list(find_blocks(nn.ModuleList([stage, stage])))
    assert found[:2] == ["0.blocks.0", "0.blocks.1"]


class ScaledMLP(nn.Module):
    """A block with a Python number of its own, as layers with a scale by depth have."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = ResidualMLP(), scale

    def forward(self, x):
        return x + self.scale * self.inner(x)


@pytest.mark.parametrize(("compiler", "tolerance"), [("eager", 0.0), ("inductor", 1e-5)])
def test_blocks_that_differ_in_a_number_share_two_captures(compiler, tolerance):
    model, batch = Stack([ScaledMLP(0.1 * depth) for depth in range(1, 6)], tied=False), make_batch()
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler=compiler)
    before = captures()
    for trained in (frozenset(selectable(model)), *random_sets(selectable(model), 3)):
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        assert counted_step(model, batch) == costs.step_flops(trained)
        step(model, batch)
        assert_same_gradients(model, expected, rtol=tolerance, atol=tolerance)
    assert captures() == before + 2


def encoder_decoder(family: str, attention: str = "sdpa") -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny T5, whose encoder ends in a norm, or BART, whose decoder reads the last encoder block."""
    torch.manual_seed(0)
    if family == "t5":
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config = T5Config(vocab_size=32, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
        model: nn.Module = T5ForConditionalGeneration(config)
    else:
        layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "dropout": 0.0}
        settings = BartConfig(vocab_size=64, d_model=16, attn_implementation=attention, **layers, **heads)
        model = BartForConditionalGeneration(settings)
    ids = torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))
    return model.train(), {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("t5", "*decoder*1.*"),
        ("t5", "lm_head.weight"),
        ("bart", "*encoder*1.*"),
        ("bart", "everything"),
        pytest.param("t5", "*encoder*1.*", marks=pytest.mark.long),
        pytest.param("t5", "everything", marks=pytest.mark.long),
        pytest.param("bart", "*decoder*1.*", marks=pytest.mark.long),
        pytest.param("bart", "*decoder*embed*", marks=pytest.mark.long),
    ],
)
def test_whatever_is_trained_first_nothing_is_captured_afterwards(family, first):
    model, batch = encoder_decoder(family)
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager")
    train_only(model, None if first == "everything" else [first])
    expected = reference_gradients(model, batch)
    flops = counted_step(model, batch)
    assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert flops == costs.step_flops(trained_parameters(model))
    seen = captures()
    step(model, batch)  # the same set once more, outside of the first forward
    for trained in [None, *random_sets(sorted(costs.fqns), 6, seed=1)]:
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        step(model, batch)
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
    assert captures() == seen


class OperatorParts:
    """Chains "compiled" to their operators: Inductor takes seconds for them."""

    def compile(self, part):
        return run_operators(copy_module(part.module))


@pytest.fixture
def by_operators(monkeypatch) -> list[BackwardGraph]:
    """The graphs of the blocks whose backward ran without a compiled chain, which "eager" has here too."""
    ran: list[BackwardGraph] = []
    take_operators, operator_program = HoistedVariants._take_operators, BackwardGraph.operator_program

    def take(variants, *arguments):
        variants._parts = OperatorParts()
        return take_operators(variants, *arguments)

    def noted(graph, live):
        plan = operator_program(graph, live)
        return Plan(plan.released, lambda inputs: ran.append(graph) or plan.backward(inputs))

    monkeypatch.setattr(HoistedVariants, "_take_operators", take)
    monkeypatch.setattr(BackwardGraph, "operator_program", noted)
    return ran


def test_in_each_stack_only_the_block_where_the_backward_ends_runs_without_its_chain(by_operators):
    model, batch = encoder_decoder("bart", attention="eager")  # in single products
    costs = backward_costs(model, batch)
    compile_blocks(model, compiler="eager")
    step(model, batch)
    layers = [name for name in sorted(costs.fqns) if ".layers." in name]
    decoder = [name for name in layers if ".decoder." in name]
    most = set()
    for trained in (*random_sets(decoder, 8), *random_sets(layers, 3)):
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        by_operators.clear()
        flops = counted_step(model, batch)
        assert_same_gradients(model, expected, rtol=1e-4, atol=1e-6)
        assert flops == costs.step_flops(trained)
        assert len(by_operators) == len(set(by_operators)), "blocks of a stack share their plans"
        most.add(len(by_operators))
    assert most == {1, 2}


class MaskedRows(nn.Module):
    """Two layers with a graph break between: only some rows go through them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.outer(self.inner(x[x[:, 0] > 0] * 2)), x])


class PassedOver(nn.Module):
    """A branch on data in a loop, for which Dynamo passes over the whole block."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        added = torch.zeros_like(x)
        for sign, expert in zip((1, -1), self.experts, strict=True):
            chosen = sign * x[:, 0] > 0
            if chosen.any():
                added[chosen] = expert(x[chosen])
        return x + added


class Tower(nn.Module):
    """Three such blocks above a layer that is not compiled."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


@pytest.mark.parametrize("kind", [MaskedRows, PassedOver])
def test_frozen_blocks_that_run_eagerly_in_part_or_whole_take_what_is_predicted(kind, caplog):
    model, batch = Tower(kind), {"x": torch.randn(6, 4)}
    compile_blocks(model, compiler="eager")
    costs = backward_costs(model, batch)
    names = sorted(costs.fqns)
    for trained in (names, ["first.bias"], names[-1:], names[:3], names[-3:], names):
        train_only(model, trained)
        expected = reference_gradients(model, batch)
        model.zero_grad()
        with count_flops() as counter:
            model(**batch).backward()
        assert counter.get_total_flops() == costs.step_flops(trained)
        assert_same_gradients(model, expected)
    said = [record.message for record in caplog.records if "runs eagerly" in record.message]
    assert len(said) == (kind is PassedOver)


@pytest.mark.parametrize("blocks", [None, [""]])
def test_compiled_blocks_are_found_behind_what_others_put_around_them(blocks):
    model, batch = Stack([ResidualMLP() for _ in range(3)], tied=False), make_batch()
    compile_blocks(model, blocks=blocks, compiler="eager")
    compiled = [module for module in model.modules() if "forward" in vars(module)]
    for module in compiled:  # as accelerate does it for mixed precision
        module.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(module.forward))
    trained = train_only(model, ["*1.*"])
    for _ in range(2):
        expected = reference_gradients(model, batch)
        step(model, batch)
        assert_same_gradients(model, expected)
        model.zero_grad()
    assert captures() > 0
    assert set(selectable(model)) > trained
    with pytest.raises(ValueError, match="compiled already"):
        compile_blocks(model)
    costs = backward_costs(model, batch)
    uncompile_blocks(model)
    assert not uses_compiled_code(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained == trained_parameters(model)
    forget_captures()
    assert counted_step(model, batch) == costs.step_flops(trained)
    assert_same_gradients(model, expected)
    assert captures() == 0
