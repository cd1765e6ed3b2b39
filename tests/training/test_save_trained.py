"""save_trained writes what was ever trained and nothing else; load_trained brings it to the base."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import gtcompile
from gtcompile.training import trained_weights
from tests.support import trainer as support
from tests.support.models import POOL, WIDTH, Recipe, Regression, make_batch, selectable, step, trained_sets

FILE = "trained.safetensors"
HEAD = ["layers.3.weight", "layers.3.bias"]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    ours, theirs = tensors_of(model), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def saved_names(folder: Path) -> set[str]:
    with safe_open(folder / FILE, framework="pt") as file:
        return set(file.keys())


def parameters_in(folder: Path, model: nn.Module) -> set[str]:
    return saved_names(folder) - {name for name, _ in model.named_buffers()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)


def train(
    model: nn.Module, trained=None, optimizer: torch.optim.Optimizer | None = None, seed: int = 0
) -> None:
    """One step."""
    gtcompile.train_only(model, trained)
    step(model, make_batch(seed))
    (optimizer or sgd(model)).step()


def trained_regression(trained=HEAD) -> tuple[nn.Module, nn.Module]:
    """A base, and a copy of it whose head was trained."""
    torch.manual_seed(0)
    base = Regression()
    model = copy.deepcopy(base)
    train(model, trained)
    return base, model


@settings(max_examples=40)
@given(st.sampled_from(POOL), st.data())
def test_a_fresh_base_becomes_the_trained_model(tmp_path_factory, recipe, data):
    """Whatever sets were trained, with any optimizer, and whatever is trained when it is saved."""
    folder = tmp_path_factory.mktemp("saved")
    model = recipe.model()
    names = selectable(model)
    kind = data.draw(st.sampled_from([torch.optim.SGD, torch.optim.AdamW]))
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    sets = data.draw(st.lists(trained_sets(names), min_size=1, max_size=4))
    for trained in sets:
        train(model, trained, optimizer)
    gtcompile.train_only(model, None)
    saved = gtcompile.save_trained(model, folder)
    assert saved == frozenset().union(*sets)
    assert saved_names(folder) == saved | dict(model.named_buffers()).keys()
    fresh = recipe.model()
    assert gtcompile.load_trained(fresh, folder) == saved
    assert_equal(fresh, model)


POLICIES = ["best", "sampled", "random", "rotating", "lisa", "last_layers", "occasionally_full"]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "blocks"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_set_of_a_policy_that_was_stepped_is_saved(tmp_path, policy, compiled):
    recipe = Recipe(("residual", "residual", "convolution", "convolution"))
    model = recipe.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if compiled:
        gtcompile.compile_blocks(model, compiler="eager")
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 0.7, policy=policy)
    ever: set[str] = set()
    for number in range(9):
        if number % 5 == 0:
            adaptive.reselect([make_batch(1), make_batch(2)])
        step(model, make_batch(number))
        ever |= {name for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        adaptive.step()
    assert gtcompile.save_trained(model, tmp_path) == ever
    fresh = recipe.model()
    gtcompile.load_trained(fresh, tmp_path)
    assert_equal(fresh, model)


def test_measuring_importance_and_the_end_of_training_train_nothing(tmp_path):
    model = Regression()
    optimizer = sgd(model)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 0.7)
    selection = adaptive.reselect([make_batch(1), make_batch(2)])
    with pytest.raises(ValueError, match="no parameter of this Regression was trained"):
        gtcompile.save_trained(model, tmp_path)
    step(model, make_batch())
    optimizer.step()
    gtcompile.train_only(model, None)
    assert gtcompile.save_trained(model, tmp_path) == selection.trained < set(selectable(model))


def test_full_training_without_any_set_is_seen(tmp_path):
    base = Regression()
    model = gtcompile.compile_blocks(copy.deepcopy(base), blocks=["layers.0"], compiler="eager")
    step(model, make_batch())
    sgd(model).step()
    assert gtcompile.save_trained(model, tmp_path) == set(selectable(model))
    gtcompile.load_trained(base, tmp_path)
    assert_equal(base, model)


class ByHand(torch.optim.Optimizer):
    """Clears the gradients inside of its step."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
                parameter.grad = None


def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer):
    def closure():
        optimizer.zero_grad()
        loss = model(**make_batch())
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("way", ["clears", "closure", "compiled step", "in the backward", "by hand"])
def test_other_ways_to_step_are_seen(tmp_path, way):
    base = Regression()
    model = copy.deepcopy(base)
    parameters = [model.get_parameter(name) for name in HEAD]
    if way == "by hand":
        gtcompile.train_only(model, HEAD)
        step(model, make_batch())
        with torch.no_grad():
            for parameter in parameters:
                parameter.data -= parameter.grad
    elif way == "closure":
        optimizer = torch.optim.LBFGS(parameters, max_iter=2)
        optimizer.step(closure_of(model, optimizer))
    elif way == "in the backward":
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in parameters}

        def step_at_once(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(step_at_once)
        model(**make_batch()).backward()
    else:
        optimizer = ByHand(parameters) if way == "clears" else torch.optim.SGD(parameters, lr=0.1)
        model(**make_batch()).backward()
        take = (
            torch.compile(lambda: optimizer.step(), backend="eager")
            if way == "compiled step"
            else optimizer.step
        )
        take()
    assert gtcompile.save_trained(model, tmp_path) == set(HEAD)
    gtcompile.load_trained(base, tmp_path)
    assert_equal(base, model)


def test_a_parameter_that_replaces_a_trained_one_was_trained(tmp_path):
    base, model = trained_regression()
    state = {name: value + 1 if name in HEAD else value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    gtcompile.train_only(model, ["layers.0.bias"])
    assert gtcompile.save_trained(model, tmp_path) == {*HEAD, "layers.0.bias"}
    gtcompile.load_trained(base, tmp_path)
    assert_equal(base, model)


def continued(kind: str, model: nn.Module, folder: Path) -> nn.Module:
    """A training that was begun with `model` and goes on with another object, as a new process would."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, 0.5, policy="last_layers")
    adaptive.reselect([make_batch(1), make_batch(2)])
    step(model, make_batch())
    optimizer.step()
    gtcompile.save_training(folder / "state", model, optimizer, adaptive, {})
    weights, state, moments = (copy.deepcopy(each.state_dict()) for each in (model, adaptive, optimizer))
    again = Regression()
    fresh = torch.optim.AdamW(again.parameters(), lr=0.1)
    own = gtcompile.AdaptiveBackprop(again, fresh, 0.5, policy="last_layers")
    if kind == "load_training":
        gtcompile.load_training(folder / "state", again, fresh, own)
    elif kind == "load_state_dict":
        own.load_state_dict(state)
        again.load_state_dict(weights)
    else:
        again.load_state_dict(weights)
        fresh.load_state_dict(moments)
        train(again, ["layers.0.bias"], fresh)
    return again


@pytest.mark.parametrize("kind", ["load_training", "load_state_dict", "optimizer"])
def test_what_was_trained_before_a_resumption_is_saved(tmp_path, kind):
    base = Regression()
    again = continued(kind, copy.deepcopy(base), tmp_path)
    saved = gtcompile.save_trained(again, tmp_path / "trained")
    assert saved - {"layers.0.bias"} == set(HEAD)
    gtcompile.load_trained(base, tmp_path / "trained")
    assert_equal(base, again)


def test_what_was_loaded_is_saved_again(tmp_path):
    base, model = trained_regression()
    gtcompile.save_trained(model, tmp_path)
    again = copy.deepcopy(base)
    gtcompile.load_trained(again, tmp_path)
    train(again, ["layers.0.bias"])
    assert gtcompile.save_trained(again, tmp_path) == {*HEAD, "layers.0.bias"}
    gtcompile.load_trained(base, tmp_path)
    assert_equal(base, again)


def test_more_parameters_are_saved_by_pattern(tmp_path):
    _, model = trained_regression()
    assert gtcompile.save_trained(model, tmp_path, also=["layers.1.*"]) == {
        *HEAD,
        "layers.1.weight",
        "layers.1.bias",
    }
    with pytest.raises(ValueError, match="matches no selectable parameter"):
        gtcompile.save_trained(model, tmp_path, also=["nothing.*"])


def test_a_tied_weight_is_saved_once(tmp_path):
    recipe = Recipe(("residual",), tied=True)
    model = recipe.model()
    train(model, ["head.weight"])
    assert gtcompile.save_trained(model, tmp_path) == {"embed.weight"}
    fresh = recipe.model()
    gtcompile.load_trained(fresh, tmp_path)
    assert fresh.head.weight is fresh.embed.weight
    assert_equal(fresh, model)


def test_buffers_are_saved_unless_the_state_dictionary_leaves_them_out(tmp_path):
    recipe = Recipe(("convolution",))
    model = recipe.model()
    model.register_buffer("scratch", torch.ones(3), persistent=False)
    train(model, ["head.bias"])
    gtcompile.save_trained(model, tmp_path)
    buffers = {f"layers.0.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert saved_names(tmp_path) == {"head.bias"} | buffers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_any_dtype_and_layout_is_saved(tmp_path, dtype):
    def build() -> nn.Module:
        model = nn.Module()
        model.kept = nn.Parameter(torch.arange(6).to(dtype).view(2, 3))
        model.trained = nn.Parameter(torch.ones(3, 2, dtype=dtype).t())
        model.scalar = nn.Parameter(torch.tensor(2, dtype=dtype))
        return model

    model = build()
    optimizer = torch.optim.SGD([model.trained], lr=0.5)
    model.trained.grad = torch.full_like(model.trained, 3)
    optimizer.step()
    assert gtcompile.save_trained(model, tmp_path) == {"trained"}
    fresh = build()
    gtcompile.load_trained(fresh, tmp_path)
    assert_equal(fresh, model)


def lora(seed: int) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = support.make_model()
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(base, config)


def test_adapters_are_saved_whole_and_loaded_into_adapters_with_other_first_values(tmp_path):
    model = lora(seed=1)
    named = dict(model.named_parameters())
    last = [name for name in named if "lora_" in name][-2:]
    gtcompile.train_only(model, last)
    ids = torch.stack([row["input_ids"] for row in support.make_data(2)])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()
    saved = gtcompile.save_trained(model, tmp_path)
    assert saved == {name for name in named if "lora_" in name}
    other = lora(seed=2)
    gtcompile.load_trained(other, tmp_path)
    assert_equal(other, model)
    full = sum(p.numel() * p.element_size() for p in model.parameters())
    assert (tmp_path / FILE).stat().st_size < full / 2


@pytest.mark.slow
def test_a_trainer_with_the_callback_saves_the_same_after_a_resumption(tmp_path):
    once = support.train(tmp_path, support.adaptive(), max_steps=4, save_strategy="steps", save_steps=2)
    saved = gtcompile.save_trained(once.model, tmp_path / "once")
    assert saved < set(selectable(once.model))
    again = support.train(tmp_path, support.adaptive(), max_steps=4, resume=str(tmp_path / "checkpoint-2"))
    assert gtcompile.save_trained(again.model, tmp_path / "again") == saved
    fresh = support.make_model()
    gtcompile.load_trained(fresh, tmp_path / "again")
    assert_equal(fresh, once.model)


# What goes wrong


def other_value(model: nn.Module) -> nn.Module:
    model.layers[0].weight.data[0, 0] += 1
    return model


def other_shape(model: nn.Module) -> nn.Module:
    model.layers[3] = nn.Linear(WIDTH, WIDTH + 1)
    return model


def deeper(model: nn.Module) -> nn.Module:
    model.layers.append(nn.Linear(WIDTH, WIDTH))
    return model


def shallower(model: nn.Module) -> nn.Module:
    del model.layers[3]
    return model


def halved(model: nn.Module) -> nn.Module:
    return model.bfloat16()


REFUSED = {
    "layers.0.weight has other values": other_value,
    r"layers.3.bias has shape \[9\], not \[8\]": other_shape,
    "layers.4.bias is new; layers.4.weight is new": deeper,
    "layers.3.bias is missing; layers.3.weight is missing": shallower,
    "layers.0.bias is torch.bfloat16, not torch.float32": halved,
}


@pytest.mark.parametrize(("said", "change"), REFUSED.items())
def test_another_base_is_refused_and_left_as_it_was(tmp_path, said, change):
    base, model = trained_regression()
    gtcompile.save_trained(model, tmp_path)
    other = change(copy.deepcopy(base))
    before = tensors_of(other)
    with pytest.raises(ValueError, match=f"of another base than this model: {said}"):
        gtcompile.load_trained(other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(other).items())


def test_the_refusal_names_the_base(tmp_path):
    base, model = trained_regression()
    model.config = {"_name_or_path": "somebody/their-model"}
    gtcompile.save_trained(model, tmp_path)
    with pytest.raises(ValueError, match="saved from 'somebody/their-model'"):
        gtcompile.load_trained(other_value(base), tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kept):
    base, model = trained_regression()
    gtcompile.save_trained(model, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: kept if kept > 1 else int(kept * len(whole))])
    before = tensors_of(base)
    with pytest.raises(ValueError, match="is damaged"):
        gtcompile.load_trained(base, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(base).items())


def test_a_changed_byte_is_noticed(tmp_path):
    base, model = trained_regression()
    gtcompile.save_trained(model, tmp_path)
    content = bytearray((tmp_path / FILE).read_bytes())
    content[-1] ^= 1
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged: layers.3.\w+ do not match"):
        gtcompile.load_trained(base, tmp_path)


def test_a_folder_without_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a folder that save_trained wrote"):
        gtcompile.load_trained(Regression(), tmp_path)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    _, model = trained_regression()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.tex and no trained\.safetensors"):
        gtcompile.save_trained(model, tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"thesis.tex is a file"):
        gtcompile.save_trained(model, tmp_path / "thesis.tex")


def test_a_file_of_somebody_else_under_our_name_is_left_alone(tmp_path):
    _, model = trained_regression()
    (tmp_path / FILE).write_bytes(b"not ours")
    with pytest.raises(ValueError, match="written by something else"):
        gtcompile.save_trained(model, tmp_path)
    assert (tmp_path / FILE).read_bytes() == b"not ours"


def test_a_failed_write_leaves_the_former_file(tmp_path, monkeypatch):
    base, model = trained_regression()
    gtcompile.save_trained(model, tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trained_weights, "save_file", full)
    with pytest.raises(gtcompile.GTCompileError, match=r"holds what it held before: .*No space left"):
        gtcompile.save_trained(model, tmp_path)
    assert os.listdir(tmp_path) == [FILE]
    gtcompile.load_trained(base, tmp_path)
    assert_equal(base, model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    _, model = trained_regression()
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(gtcompile.GTCompileError, match="could not be written"):
            gtcompile.save_trained(model, tmp_path / "inside")
    finally:
        tmp_path.chmod(0o700)


def test_a_path_that_cannot_be_created_is_refused():
    _, model = trained_regression()
    with pytest.raises(gtcompile.GTCompileError, match="could not be written"):
        gtcompile.save_trained(model, "/proc/nowhere/trained")


KILLED = """
import os, sys, torch, gtcompile
from gtcompile.training import trained_weights
from tests.support.models import Regression, make_batch, step
torch.manual_seed(0)
model = Regression()
gtcompile.train_only(model, ["layers.0.*"])
write = trained_weights.save_file
def killed(tensors, path, metadata):
    write(tensors, path, metadata)
    os._exit(9)
trained_weights.save_file = killed
gtcompile.save_trained(model, sys.argv[1])
"""


def test_a_kill_leaves_the_former_file_and_the_next_save_cleans_up(tmp_path):
    base, model = trained_regression()
    gtcompile.save_trained(model, tmp_path)
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, check=False)
    assert done.returncode == 9
    assert len(os.listdir(tmp_path)) == 2
    fresh = copy.deepcopy(base)
    gtcompile.load_trained(fresh, tmp_path)
    assert_equal(fresh, model)
    gtcompile.save_trained(model, tmp_path)
    assert os.listdir(tmp_path) == [FILE]


def test_a_model_without_values_is_refused(tmp_path):
    with torch.device("meta"):
        model = Regression()
    for call in (gtcompile.save_trained, gtcompile.load_trained):
        with pytest.raises(ValueError, match="on the meta device and has no values"):
            call(model, tmp_path)


def test_a_sharded_model_is_refused(tmp_path, one_rank):
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(Regression())
    with pytest.raises(ValueError, match="is sharded, so no rank has its values; save with save_training"):
        gtcompile.save_trained(model, tmp_path)


def test_a_wrapped_model_is_saved_under_its_own_names(tmp_path, one_rank):
    base, model = trained_regression()
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    assert gtcompile.save_trained(torch.compile(wrapped), tmp_path / "trained") == set(HEAD)
    assert gtcompile.save_trained(wrapped, tmp_path / "trained") == set(HEAD)
    gtcompile.load_trained(base, tmp_path / "trained")
    assert_equal(base, model)


def test_checksums_tell_their_progress(tmp_path, monkeypatch, caplog):
    _, model = trained_regression()
    monkeypatch.setattr(trained_weights, "_SECONDS", -1)
    with caplog.at_level("INFO"):
        gtcompile.save_trained(model, tmp_path / "trained")
    assert "checksums of 0.0 of 0.0 GB of weights" in caplog.text
