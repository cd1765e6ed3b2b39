"""Five hundred steps of all that training does: gradients right, nothing compiled again, memory flat."""

import gc
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gtcompile import compile_blocks, train_only
from gtcompile.testing import assert_same_gradients, reference_gradients
from tests.support.models import captures

STEPS, STEPS_PER_SET, STEPS_PER_EVALUATION, STEPS_PER_CHECK = 500, 5, 25, 2
LENGTHS = range(4, 13)
VOCABULARY = 32
SETTLED = 100
"""Steps after which every kind of input has been seen."""


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).train()


def draw(chance: random.Random) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, chance.choice(LENGTHS)))
    return {"input_ids": ids, "labels": ids}


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.long
@pytest.mark.parametrize(("compiler", "tolerance"), [("eager", 0.0), ("inductor", 1e-4)])
def test_a_long_training_stays_right_and_grows_nowhere(compiler, tolerance):
    model, chance = build(), random.Random(0)
    compile_blocks(model, compiler=compiler)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    names = [name for name, _ in model.named_parameters()]
    settled_captures, alive = 0, []
    for number in range(STEPS):
        if number % STEPS_PER_SET == 0:
            train_only(model, chance.sample(names, chance.randint(1, len(names))))
        if number % STEPS_PER_EVALUATION == 0:
            model.eval()
            with torch.no_grad():
                assert torch.isfinite(model(**draw(chance)).loss)
            model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False)
            model.train()
        batch = draw(chance)
        checked = number % STEPS_PER_CHECK == 0
        expected = reference_gradients(model, batch) if checked else {}
        model(**batch).loss.backward()
        if checked:
            assert_same_gradients(model, expected, rtol=tolerance, atol=tolerance)
        optimizer.step()
        optimizer.zero_grad()
        if number == SETTLED:
            settled_captures = captures()
        if number >= SETTLED and number % (STEPS // 5) == 0:
            alive.append(tensors_alive())
    assert captures() == settled_captures
    assert max(alive) - min(alive) <= 3 * len(names), (
        alive
    )  # gradients, moments: nothing that grows by the step
    assert alive[-1] <= alive[0] + 3 * len(names)
