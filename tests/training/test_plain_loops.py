"""AdaptiveBackprop in loops of one's own: with PEFT, with accelerate, of pairs, and resumed."""

import contextlib

import pytest
import torch
from transformers import LlamaForCausalLM

import gtcompile
from gtcompile.graph.flops import count_flops
from tests.support.trainer import assert_same_weights, make_data, make_model, weights
from tests.support.training import freeze_eagerly


def test_a_peft_model_works_in_a_plain_loop():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model(), config)
    model.enable_input_require_grads()
    gtcompile.compile_blocks(model, compiler="eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    own = gtcompile.AdaptiveBackprop(model, optimizer, 0.9)
    rows = torch.stack([row["input_ids"] for row in make_data(8)])
    batches = [
        {"input_ids": part, "labels": part, "attention_mask": torch.ones_like(part)} for part in rows.split(2)
    ]
    selection = own.reselect(batches[:2])
    model(**batches[2]).loss.backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == selection.trained
    assert all("lora_" in name for name in gradients)
    gtcompile.uncompile_blocks(model)


def accelerated_loop(folder, compile_when, resume=False):
    """Eight steps that select anew at 0 and 4; saved once, right after the second selection."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    loader = torch.utils.data.DataLoader(make_data(16), batch_size=2)
    if compile_when == "before":
        gtcompile.compile_blocks(model, compiler="eager")
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if compile_when == "after":
        gtcompile.compile_blocks(model, compiler="eager")
    own = gtcompile.AdaptiveBackprop(model, optimizer, 0.6)
    accelerator.register_for_checkpointing(own)
    batches = list(loader)
    if resume:
        accelerator.load_state(folder / "state")
    for number, batch in list(enumerate(batches))[4 if resume else 0 :]:
        if number in (0, 4) and not resume:
            own.reselect(batches[:2])
        if number == 4 and not resume:
            accelerator.save_state(folder / "state")
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            gradients = {n for n, p in model.named_parameters() if p.grad is not None}
            assert gradients == own.selection.trained
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return accelerator.unwrap_model(model), accelerator.get_state_dict(model)


@pytest.mark.slow
@pytest.mark.parametrize("compile_when", ["before", "after"])
def test_a_plain_loop_with_accelerate_trains_saves_and_goes_on(tmp_path, compile_when):
    model, saved = accelerated_loop(tmp_path, compile_when)
    assert list(saved) == list(make_model().state_dict())
    model.save_pretrained(tmp_path / "model", state_dict=saved)
    assert_same_weights(weights(LlamaForCausalLM.from_pretrained(tmp_path / "model")), weights(model))
    again, _ = accelerated_loop(tmp_path, compile_when, resume=True)
    assert_same_weights(weights(again), weights(model))


def plain_loop(folder, setting, save_after=None, resume=False):
    """Eight steps of a loop of one's own that selects at 0, 3 and 6, saved once and continued from there."""
    model = make_model(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gtcompile.compile_blocks(model, compiler="eager")
    own = gtcompile.AdaptiveBackprop(model, optimizer, 0.6, frozen_state=setting)
    rows = torch.stack([row["input_ids"] for row in make_data(20)])
    batches = [{"input_ids": part, "labels": part} for part in rows.split(2)]
    start = 0
    if resume:
        saved = torch.load(folder / "state")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        own.load_state_dict(saved["adaptive"])
        torch.set_rng_state(saved["random"])
        start = saved["step"]
    for step in range(start, 8):
        if step % 3 == 0:
            own.reselect(batches[8:])
        model(**batches[step]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == save_after:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(
                {**state, "adaptive": own.state_dict(), "random": torch.get_rng_state()}, folder / "state"
            )
    gtcompile.uncompile_blocks(model)
    return weights(model), own.history


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "save_after"), [("keep", 2), ("cpu", 3), ("drop", 3), ("drop", 4)])
def test_a_plain_loop_resumes_bit_for_bit(tmp_path, setting, save_after):
    """In the middle of a stretch, right before a selection and right after one."""
    whole, history = plain_loop(tmp_path, setting, save_after=save_after)
    resumed, continued = plain_loop(tmp_path, setting, resume=True)
    assert continued == history
    assert_same_weights(whole, resumed)


class Pairs(torch.nn.Module):
    """Takes tokens and targets, and returns logits and loss, as nanoGPT's model does."""

    def __init__(self):
        super().__init__()
        self.inner = make_model()

    def forward(self, tokens, targets):
        output = self.inner(input_ids=tokens, labels=targets)
        return output.logits, output.loss


def accelerate_loop(choose):
    """Four optimizer steps of two batches each, with Accelerate."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = choose.prepare(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = torch.utils.data.DataLoader(make_data(16), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for number, batch in enumerate(loader):
        if number % 2 == 0:
            choose(model, optimizer, list(loader)[:2], None)
        with accelerator.accumulate(model), choose.counting():
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                choose.note_gradients(model)
            optimizer.step()
            optimizer.zero_grad()


def loop_of_pairs(choose):
    """Four optimizer steps of two batches each, of a model that returns its loss second."""
    model = choose.prepare(Pairs())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = torch.stack([row["input_ids"] for row in make_data(16)])
    batches = [(part, part) for part in rows.split(2)]
    for number, (tokens, targets) in enumerate(batches):
        if number % 2 == 0:
            choose(model, optimizer, batches[:2], lambda model, batch: model(*batch)[1])
        with choose.counting():
            _, loss = model(tokens, targets)
            (loss / 2).backward()
        if number % 2:
            choose.note_gradients(model)
            optimizer.step()
            optimizer.zero_grad()


class Notes:
    """Gradients of each step, or FLOPs of each batch: counting changes the last bit of gradients."""

    def __init__(self, counts):
        self.counts, self.gradients, self.flops = counts, [], []

    def note_gradients(self, model):
        named = model.named_parameters()
        self.gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    @contextlib.contextmanager
    def counting(self):
        if not self.counts:
            yield
            return
        with count_flops() as counter:
            yield
        self.flops.append(counter.get_total_flops())


class Adaptively(Notes):
    """Compiles, and selects anew before every optimizer step."""

    def __init__(self, counts):
        super().__init__(counts)
        self.own, self.sets, self.planned = None, [], []

    def prepare(self, model):
        return gtcompile.compile_blocks(model, compiler="eager")

    def __call__(self, model, optimizer, batches, loss_fn):
        self.own = self.own or gtcompile.AdaptiveBackprop(model, optimizer, 0.6, loss_fn=loss_fn)
        self.sets.append(self.own.reselect(batches).trained)
        self.planned += 2 * [self.own.step_flops]


class Eagerly(Notes):
    """Freezes by `requires_grad_` what another loop had frozen at each step."""

    def __init__(self, counts, sets):
        super().__init__(counts)
        self.sets = list(sets)

    def prepare(self, model):
        return model

    def __call__(self, model, optimizer, batches, loss_fn):
        freeze_eagerly(model, self.sets.pop(0))


@pytest.mark.slow
@pytest.mark.parametrize("loop", [accelerate_loop, loop_of_pairs])
def test_gradients_and_flops_of_a_loop_are_those_of_the_loop_frozen_by_requires_grad(loop):
    ours = Adaptively(counts=False)
    loop(ours)
    theirs = Eagerly(False, ours.sets)
    loop(theirs)
    assert len(ours.gradients) == 4
    assert len(set(ours.sets)) > 1
    for trained, gradients, expected in zip(ours.sets, ours.gradients, theirs.gradients, strict=True):
        assert trained == gradients.keys() == expected.keys()
        assert all(torch.equal(gradients[name], expected[name]) for name in trained)
    counted = Adaptively(counts=True)
    loop(counted)
    expected = Eagerly(True, counted.sets)
    loop(expected)
    assert counted.flops == expected.flops == counted.planned
