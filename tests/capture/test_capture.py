"""Capturing models: meta device, tied and frozen weights, graph breaks, refusals, and nothing changed."""

import contextlib
import copy
import dataclasses
import logging
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from gtcompile import CaptureError, backward_costs, compile_blocks
from gtcompile.capture.capture import _tell_devices, capture
from gtcompile.capture.model_io import check_batch, list_parameters, loss_of, unwrap
from gtcompile.capture.pristine_model import blocks_uncompiled
from gtcompile.costs.backward_costs import costs_of
from gtcompile.graph.flops import count_flops
from gtcompile.graph.joint_graph import ONE_BATCH
from gtcompile.torch_internals import FakeTensorMode, TangentAOTInput
from tests.support.graphs import text_of
from tests.support.models import POOL, Recipe, Regression, make_batch, random_sets


class Wrapped(nn.Module):
    """A regression whose forward's result is passed through a function."""

    def __init__(self, wrap):
        super().__init__()
        self.inner, self.wrap = Regression(2), wrap

    def forward(self, x, y):
        return self.wrap(self.inner(x, y))


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor | None = None


@torch.compiler.disable
def outside_of_dynamo(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x)


def meta_twin(recipe: Recipe) -> nn.Module:
    with torch.device("meta"):
        return recipe.model()


@pytest.mark.parametrize("recipe", [POOL[0], POOL[3], POOL[4]], ids=str)
def test_a_model_on_the_meta_device_is_captured_like_the_real_one(recipe):
    meta = meta_twin(recipe)
    real, without_weights = (capture(model, recipe.batch()) for model in (recipe.model(), meta))
    assert text_of(without_weights.module) == text_of(real.module)
    assert without_weights.parameters == real.parameters
    assert without_weights.slots == real.slots
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])


def test_the_meta_twin_keeps_ties_and_user_frozen_parameters():
    parameters = {p.fqn: p for p in capture(meta_twin(POOL[3]), POOL[3].batch()).parameters}
    assert parameters["embed.weight"].aliases == ("head.weight",)
    assert parameters["layers.2.scale"].status == "frozen by user"


def test_parameters_are_listed_in_registration_order_with_their_aliases():
    model = Recipe(("partly unused",), tied=True).model()
    listed = list_parameters(model)
    assert [p.fqn for p in listed] == [name for name, _ in model.named_parameters()]
    assert listed[0].aliases == ("head.weight",)
    assert [p.shape for p in listed] == [tuple(p.shape) for p in model.parameters()]


def test_unused_parameters_are_reported_after_the_capture():
    model = Recipe(("partly unused",)).model()
    assert {p.status for p in list_parameters(model)} == {"selectable", "frozen by user"}
    captured = {p.fqn: p.status for p in capture(model, make_batch()).parameters}
    assert captured["layers.0.never_called.bias"] == "unused"


def test_both_slots_of_a_tied_weight_carry_one_name():
    joint = capture(Recipe(("norm",), tied=True).model(), make_batch())
    assert "head.weight" not in joint.slots
    assert "embed.weight" in joint.live


def test_one_tangent_seeds_the_backward():
    joint = capture(Regression(2), make_batch())
    placeholders = joint.graph.find_nodes(op="placeholder")
    (tangent,) = (node for node in placeholders if isinstance(node.meta["desc"], TangentAOTInput))
    assert tangent.meta["val"].shape == ()


@pytest.mark.parametrize(
    "wrap",
    [
        *(lambda loss: {"loss": loss, "logits": None}, Output, lambda loss: loss.reshape(1)),
        *(lambda loss: (loss, loss.expand(3)), lambda loss: (loss, 2 * loss.detach())),
        lambda loss: (loss.expand(3), loss, None),
    ],
    ids=["mapping", "attribute", "one element", "first of a tuple", "first scalar", "only scalar"],
)
def test_the_loss_is_found_where_models_put_it(wrap):
    torch.manual_seed(0)
    costs = backward_costs(Wrapped(wrap), make_batch())
    assert costs.full_flops == backward_costs(Regression(2), make_batch()).full_flops


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda loss: (loss.expand(3), loss, 2 * loss), r"got a tensor of shape \[3\]"),
        (lambda loss: ((loss,), "none"), "got tuple"),
        (lambda loss: (), "got tuple"),
        (lambda loss: {"logits": loss}, "got dict"),
        (lambda loss: Output(loss=None), "got Output"),
        (lambda loss: loss.expand(3), r"got a tensor of shape \[3\]"),
    ],
    ids=[
        "two scalars behind logits",
        "nested tuple",
        "empty tuple",
        "no loss in the mapping",
        "loss is None",
        "three values",
    ],
)
def test_a_model_without_a_scalar_loss_is_refused(wrap, message):
    with pytest.raises(CaptureError, match=message) as raised:
        capture(Wrapped(wrap), make_batch())
    assert "Does the batch contain labels?" in str(raised.value)


def test_a_loss_is_found_in_real_outputs():
    loss = torch.tensor([2.0])
    assert loss_of(loss).shape == ()
    assert loss_of({"loss": loss}) == loss_of(Output(loss)) == 2


def test_a_batch_with_unknown_keys_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"Regression.forward takes no 'label', 'z'; it takes x, y"):
        capture(Regression(), make_batch() | {"label": 1, "z": 2})


def test_a_batch_that_lacks_what_the_model_needs_is_refused_before_any_work():
    with pytest.raises(ValueError, match=r"Regression.forward needs y, which the batch lacks; it has x\."):
        capture(Regression(), {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"needs x, y, which the batch lacks; it has nothing\."):
        capture(Regression(), {})


@pytest.mark.parametrize(
    "batch", [[torch.zeros(1)], torch.zeros(1), {1: torch.zeros(1)}], ids=["list", "tensor", "int"]
)
def test_a_batch_that_is_no_keyword_dictionary_is_refused(batch):
    with pytest.raises(TypeError, match="keyword dictionary"):
        capture(Regression(), batch)


def test_a_forward_with_keyword_catch_all_takes_any_key():
    class Any(Regression):
        def forward(self, **batch):
            return super().forward(batch["x"], batch["y"])

    check_batch(Any(), {"x": 1, "whatever": 2})
    assert capture(Any(2), make_batch()).live


def test_a_model_with_nothing_to_train_is_refused():
    model = Regression().requires_grad_(False)
    with pytest.raises(CaptureError, match="no parameter with requires_grad=True"):
        capture(model, make_batch())


class Adjacency(nn.Module):
    """A graph network's layer: features are exchanged along a sparse matrix, which may be trained."""

    def __init__(self, layout, trained):
        super().__init__()
        edges = torch.eye(6).to_sparse(layout=layout, blocksize=(2, 2) if "bs" in str(layout) else None)
        self.features, self.edges = nn.Linear(4, 3), nn.Parameter(edges, requires_grad=trained)

    def forward(self, x):
        return (self.edges @ self.features(x)).square().mean()


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
def test_a_compressed_sparse_parameter_is_refused_before_torch_ends_the_process(layout, trained):
    with pytest.raises(CaptureError, match=rf"\[6, 6\] in the layout {layout}.*to_dense"):
        capture(Adjacency(layout, trained), {"x": torch.randn(6, 4)})


def test_a_graph_break_falls_back_to_tracing_without_dynamo():
    class Broken(Regression):
        def forward(self, x, y):
            return super().forward(outside_of_dynamo(x), y)

    class Whole(Regression):
        def forward(self, x, y):
            return super().forward(torch.tanh(x), y)

    broken, whole = Broken(3), Whole(3)
    assert capture(broken, make_batch()).source == "eager trace"
    assert capture(whole, make_batch()).source == "dynamo"
    costs, expected = (backward_costs(model, make_batch()) for model in (broken, whole))
    assert costs == expected


def test_a_branch_on_data_is_refused_without_weights_with_every_reason():
    class Branching(Regression):
        def forward(self, x, y):
            return super().forward(x, y) * (2 if x.sum() > 0 else 1)

    with pytest.raises(CaptureError, match="could not capture Branching as one graph") as raised:
        capture(Branching().to("meta"), make_batch())
    reasons = [line for line in str(raised.value).splitlines() if line.startswith("  ")]
    assert len(reasons) == 3
    assert "Dynamo" in reasons[0]
    assert "a branch on data" in str(raised.value).lower()


def test_log_calls_in_the_forward_are_passed_over():
    logger = logging.getLogger("a model's own")

    class Chatty(Regression):
        def forward(self, x, y):
            logger.warning("running on %s", x.shape)
            return super().forward(x, y)

    assert capture(Chatty(2), make_batch()).source == "dynamo"


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything a capture could change, as values and identities."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {
        "identity": [(name, id(tensor)) for name, tensor in named],
        "values": [tensor.detach().clone() for _, tensor in named],
        "gradients": [None if t.grad is None else t.grad.clone() for _, t in named],
        "requires_grad": [tensor.requires_grad for _, tensor in named],
        "training": [module.training for module in model.modules()],
        "random": torch.get_rng_state(),
    }


def same(before: object, after: object) -> bool:
    if isinstance(before, torch.Tensor):
        return isinstance(after, torch.Tensor) and torch.equal(before, after)
    if isinstance(before, list):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after


@pytest.mark.parametrize("recipe", [POOL[2], POOL[3], POOL[4], POOL[6]], ids=str)
def test_nothing_in_the_model_changes(recipe):
    model, batch = recipe.model(), recipe.batch()
    model(**batch).backward()
    model.layers[0].eval()
    before = state_of(model)
    given = copy.deepcopy(batch)
    capture(model, batch)
    after = state_of(model)
    assert {key: same(before[key], after[key]) for key in before} == dict.fromkeys(before, True)
    assert all(torch.equal(given[key], batch[key]) for key in batch)


def test_nothing_changes_when_the_capture_fails():
    class Failing(Regression):
        def __init__(self):
            super().__init__()
            self.again = self.layers

        def forward(self, x, y):
            self.loss = super().forward(x, y)
            raise RuntimeError("too warm")

    model = Failing()
    before = state_of(model)
    with pytest.raises(CaptureError):
        capture(model, make_batch())
    after = state_of(model)
    assert all(same(before[key], after[key]) for key in before)
    assert not hasattr(model, "loss")


class Restless(Regression):
    """Changes itself and its class in every forward, in the ways it is told, and may fail afterwards."""

    calls = 0
    seen: ClassVar = []

    def __init__(self, changes, fails):
        super().__init__()
        self.changes, self.fails, self.notes = changes, fails, {"losses": [], "names": {"first"}}
        self.part = nn.Linear(2, 2)

    def forward(self, x, y):
        loss = super().forward(outside_of_dynamo(x), y)
        for change in self.changes:
            CHANGES[change](self, loss)
        if self.fails:
            raise RuntimeError("too warm")
        return loss


CHANGES = {
    "attribute": lambda model, loss: setattr(model, "last", loss),
    "collections": lambda model, loss: (model.notes["losses"].append(loss), model.notes["names"].add("new")),
    "flag and hooks": lambda model, loss: (
        setattr(model, "hooked", True),
        model.part.register_forward_hook(lambda *_: None, with_kwargs=True),
        model.register_forward_pre_hook(lambda *_: None),
    ),
    "another module": lambda model, loss: setattr(model, "part", nn.Linear(2, 2)),
    "a new module": lambda model, loss: model.add_module("more", nn.Linear(2, 2)),
    "class": lambda model, loss: (setattr(Restless, "calls", loss), Restless.seen.append(loss)),
    "new in class": lambda model, loss: setattr(Restless, "device", loss.device),
}


def collections_of(owner: object) -> dict[str, object]:
    """What modules or classes hold, by identity, collections with their items."""
    return {
        name: (id(value), str(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(owner).items()
    }


@given(st.sets(st.sampled_from(sorted(CHANGES))), st.booleans())
@settings(max_examples=8)
def test_whatever_a_forward_writes_to_its_modules_and_classes_is_undone_after_a_capture(changes, fails):
    model = Restless(sorted(changes), fails)
    owners = [*model.modules(), Restless]
    before = [collections_of(owner) for owner in owners]
    with pytest.raises(CaptureError, match="too warm") if fails else contextlib.nullcontext():
        capture(model, make_batch())
    assert [collections_of(owner) for owner in owners] == before


def test_a_model_that_puts_hooks_on_itself_when_it_first_runs_can_run_after_a_failed_capture():
    """As transformers does to collect router logits."""

    class Collecting(Regression):
        fails = True

        def forward(self, x, y):
            if not hasattr(self, "collected"):
                self.collected = []
                self.layers[0].register_forward_hook(lambda _m, _i, output: self.collected.append(output))
            self.collected.clear()
            loss = super().forward(x, y)
            if self.fails:
                raise RuntimeError("too warm")
            return loss + self.collected[0].mean()

    model, batch = Collecting(), make_batch()
    with pytest.raises(CaptureError, match="too warm"):
        capture(model, batch)
    model.fails = False
    expected = copy.deepcopy(model)(**batch)
    assert capture(model, batch).live
    assert torch.equal(model(**batch), expected)


def test_a_capture_is_the_same_every_time():
    model = Recipe(("attention",)).model()
    first, again = (capture(model, make_batch()) for _ in range(2))
    assert text_of(first.module) == text_of(again.module)


def test_a_captured_shape_does_not_make_later_ones_dynamic():
    model = Regression(2)
    for rows in (2, 3, 4):
        joint = capture(model, make_batch(0, rows, 8))
        placeholders = joint.module.graph.find_nodes(op="placeholder")
        assert (rows, 8) in [tuple(node.meta["val"].shape) for node in placeholders]


def test_a_compiled_model_is_captured_as_its_author_wrote_it():
    model, batch = Recipe(("attention", "attention")).model(), make_batch()
    plain = backward_costs(model, batch)
    wrapped = torch.compile(model, backend="gtcompile", options={"compiler": "eager"})
    assert unwrap(wrapped) is model
    assert backward_costs(wrapped, batch) == plain
    compile_blocks(model, compiler="eager")
    assert backward_costs(model, batch) == plain


def test_compiled_blocks_are_back_after_a_capture():
    model = compile_blocks(Recipe(("residual", "residual")).model(), compiler="eager")
    forwards = [vars(layer)["forward"] for layer in model.layers]
    with blocks_uncompiled(model):
        assert not any("forward" in vars(layer) for layer in model.layers)
    assert [vars(layer)["forward"] for layer in model.layers] == forwards


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"expected an nn.Module, got dict"):
        capture({}, {})


def test_random_sets_for_the_tests_are_different_and_not_empty():
    sets = random_sets(["a", "b", "c"], 7)
    assert len(set(sets)) == 7
    assert frozenset() not in sets


class Cached(nn.Module):
    """Fills a cache that Dynamo cannot trace, unless told not to, and looks at the data while it does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Regression(2)

    def forward(self, x, y, use_cache=True):
        if use_cache:
            torch._dynamo.graph_break()
            assert x.sum().item() == x.sum().item()
        return self.inner(x, y)


def test_a_cache_that_cannot_be_captured_is_left_out():
    graph, plain = capture(Cached(), make_batch()), capture(Regression(2), make_batch())
    assert graph.source == "dynamo"
    assert costs_of(graph).full_flops == costs_of(plain).full_flops


class AwareOfExport(nn.Module):
    """Multiplies once more for exporters, and returns a product beside its loss, deep in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Regression(2)

    def forward(self, x, y):
        if torch.compiler.is_exporting():
            x = x @ torch.eye(x.shape[-1])
        rows = x.flatten(0, -2)
        return {"loss": self.inner(x, y), "beside": [(rows @ rows.t(), rows)]}


def test_a_model_is_captured_as_it_is_compiled_and_not_as_it_is_exported():
    model, batch = AwareOfExport(), make_batch()
    costs = backward_costs(model, batch)
    compiled = torch.compile(model, backend="eager")  # torch 2.11 says here too that it is exporting
    with count_flops() as counter:
        loss_of(compiled(**batch)).backward()
    assert counter.get_total_flops() == costs.full_flops
    rows, width = batch["x"].flatten(0, -2).shape
    beside = 2 * rows * rows * width
    assert costs.forward_flops >= backward_costs(Regression(2), batch).forward_flops + beside


def test_a_model_traced_without_dynamo_is_told_that_it_is_compiled():
    class Aware(Regression):
        def forward(self, x, y):
            x = outside_of_dynamo(x)
            if torch.compiler.is_compiling():
                x = x @ torch.eye(x.shape[-1])
            return super().forward(x, y)

    model, batch = Aware(2), make_batch()
    graph, compiled = capture(model, batch), torch.compile(model, backend="eager")
    assert graph.source == "eager trace"
    with count_flops() as counter:
        compiled(**batch).backward()
    assert counter.get_total_flops() == costs_of(graph).full_flops


def test_a_model_that_fails_where_it_is_compiled_costs_what_it_does_after_the_graph_break():
    class Careless(Regression):
        def forward(self, x, y):
            scale = None if torch.compiler.is_compiling() else torch.eye(x.shape[-1])
            return super().forward(x @ scale[:], y)

    model, batch = Careless(2), make_batch()
    graph, compiled = capture(model, batch), torch.compile(model, backend="eager")
    with count_flops() as counter:
        compiled(**batch).backward()
    assert counter.get_total_flops() == costs_of(graph).full_flops


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("of_values", [False, True])
def test_a_checkpoint_that_dynamo_cannot_trace_costs_what_it_holds(of_values, reentrant):
    """Below it nothing asks for a gradient: eager PyTorch has the input do so, by a hook set aside here."""

    class Checkpointed(Regression):
        def forward(self, x, y):
            if of_values:
                assert x.sum().item() == x.sum().item()
            return checkpoint(super().forward, outside_of_dynamo(x), y, use_reentrant=reentrant)

    graph, plain = capture(Checkpointed(2), make_batch()), capture(Regression(2), make_batch())
    assert graph.source == (ONE_BATCH if of_values else "eager trace")
    assert graph.live == plain.live
    assert costs_of(graph).full_flops == costs_of(plain).full_flops


def test_only_what_takes_flops_is_kept_beside_the_loss():
    assert capture(AwareOfExport(), make_batch()).forward_outputs == 2
    assert capture(Regression(2), make_batch()).forward_outputs == 1


def test_a_check_on_data_is_no_obstacle():
    class Checked(Regression):
        def forward(self, x, y):
            rows = int((x[..., 0] > 0).sum())
            torch._check(rows >= 0)
            return super().forward(x, y)

    costs, expected = (backward_costs(model, make_batch()) for model in (Checked(2), Regression(2)))
    assert costs.full_flops == expected.full_flops


def test_nodes_have_the_same_names_whatever_is_returned_beside_the_loss():
    class Talkative(Regression):
        def forward(self, x, y):
            return {"loss": super().forward(x, y), "beside": [x.sin(), y * 2]}

    talkative, silent = (capture(model, make_batch()) for model in (Talkative(2), Regression(2)))
    assert text_of(talkative.module) == text_of(silent.module)


class Writing(nn.Module):
    """Writes to its batch and, by its norm, to buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(3), nn.Linear(3, 3)

    def forward(self, x):
        x[x > 1] = 1
        return self.linear(self.norm(x)).square().mean()


def test_the_loss_comes_before_what_a_forward_writes_to_its_inputs():
    joint = capture(Writing(), {"x": torch.randn(4, 3)})
    assert joint.forward_outputs == 1
    assert joint.outputs[0].meta["val"].shape == ()


class Rotated(Regression):
    """Caches a table on itself in its first forward, and whenever a batch is longer than the table."""

    def __init__(self, where: str) -> None:
        super().__init__(2)
        self.where, self.table = where, None
        self.tables: dict[str, torch.Tensor] = {}

    def forward(self, x, y):
        torch._dynamo.graph_break()
        rows = x.shape[-2]
        if self.where == "attribute":
            if self.table is None or self.table.shape[0] < rows:
                self.table = torch.cos(torch.arange(rows, dtype=x.dtype))[:, None]
            table = self.table
        else:
            table = self.tables.setdefault("table", torch.cos(torch.arange(rows, dtype=x.dtype))[:, None])
        return super().forward(x * table[:rows], y)


@pytest.mark.parametrize("where", ["attribute", "dictionary"])
def test_a_table_that_the_forward_caches_on_its_module_is_no_obstacle(where):
    model = Rotated(where)
    before = capture(model, make_batch(0, 3, 8))
    assert (model.table, model.tables) == (None, {})
    model(**make_batch(0, 3, 8)).backward()
    after = capture(model, make_batch(0, 3, 8))
    assert costs_of(before).shared_work == costs_of(after).shared_work
    if where == "attribute":
        assert costs_of(capture(model, make_batch(0, 5, 8))).full_flops > costs_of(after).full_flops
        assert model.table.shape == (3, 1)


@pytest.mark.parametrize("weights_on_meta", [False, True])
def test_a_batch_on_the_meta_device_costs_what_a_real_one_does(weights_on_meta):
    recipe = POOL[3]
    batch = {name: tensor.to("meta") for name, tensor in recipe.batch().items()}
    joint = capture(meta_twin(recipe) if weights_on_meta else recipe.model(), batch)
    assert text_of(joint.module) == text_of(capture(recipe.model(), recipe.batch()).module)
    assert all(tensor.is_meta for tensor in batch.values())


def test_a_branch_on_a_batch_on_the_meta_device_is_refused_with_a_true_reason():
    class Branching(Regression):
        def forward(self, x, y):
            return super().forward(x, y) * (2 if x.sum() > 0 else 1)

    batch = {name: tensor.to("meta") for name, tensor in make_batch().items()}
    with pytest.raises(CaptureError, match="real weights and a real batch") as raised:
        capture(Branching(), batch)
    assert raised.value.without_values


@pytest.mark.slow
def test_an_error_says_what_was_tried_where_docstrings_are_stripped():
    program = """
import torch, gtcompile
class Failing(torch.nn.Linear):
    def forward(self, x):
        raise RuntimeError("too warm")
try:
    gtcompile.backward_costs(Failing(2, 2), {"x": torch.ones(1, 2)})
except gtcompile.CaptureError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-OO", "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert "could not capture Failing as one graph" in run.stdout
    assert "  Through Dynamo, as torch.compile captures. " in run.stdout
    assert "  Operator by operator, with the values of this batch. RuntimeError: too warm" in run.stdout


def test_a_batch_on_another_device_is_said_to_be_there():
    model = nn.Linear(2, 2)
    with FakeTensorMode():
        elsewhere = torch.empty(2, device="cuda:0")
    told = _tell_devices(model, {"x": elsewhere, "name": "a"})
    assert told == "\nThe model is on cpu and the batch on cuda:0: move the batch there first."
    assert _tell_devices(model, {"x": elsewhere, "lengths": torch.ones(2)}) == ""
    assert _tell_devices(model.to("meta"), {"x": elsewhere}) == ""
