"""Bytes of gradients and optimizer state, predicted and measured, for each setting of `frozen_state`."""

import argparse
import itertools
from collections.abc import Iterator

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gtcompile.state.optimizer_state import Setting, state_bytes
from gtcompile.state.trained_set import is_trained
from gtcompile.training.adaptive import AdaptiveBackprop

BUDGETS, SETTINGS = (0.4, 0.5, 0.7), ("keep", "cpu", "drop")


def measure(budget: float, setting: Setting, selections: int) -> Iterator[tuple[str, int, int]]:
    """Train with AdamW over several selections; yields what, predicted bytes and measured bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=6)
    config.num_attention_heads = config.num_key_value_heads = 4
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adaptive = AdaptiveBackprop(model, optimizer, budget, frozen_state=setting)
    ever: set[torch.nn.Parameter] = set()
    for _ in range(selections):
        batches = [{"input_ids": rows, "labels": rows} for rows in torch.randint(64, (2, 4, 32))]
        adaptive.reselect(batches)
        optimizer.zero_grad()
        model(**batches[0]).loss.backward()
        optimizer.step()
        ever |= {p for p in model.parameters() if is_trained(p)}
    trained = {p for p in model.parameters() if is_trained(p)}
    frozen = [p for p in model.parameters() if p not in trained]
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    yield "gradients", _bytes(trained), gradients
    yield "state, trained", 2 * _bytes(trained), sum(state_bytes(optimizer, p) for p in trained)
    expected = 0 if setting == "drop" else 2 * _bytes(ever - trained)
    where = "state, frozen, host" if setting == "cpu" else "state, frozen"
    yield where, expected, sum(state_bytes(optimizer, p) for p in frozen)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--selections", type=int, default=4)
    selections = parser.parse_args().selections
    print(f"{'budget':>6}  {'frozen_state':12}  {'what':20} {'predicted':>10} {'measured':>10}")
    for budget, setting in itertools.product(BUDGETS, SETTINGS):
        for what, predicted, measured in measure(budget, setting, selections):  # type: ignore[arg-type]
            print(f"{budget:6}  {setting:12}  {what:20} {predicted:10,} {measured:10,}")


def _bytes(parameters: set[torch.nn.Parameter]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


if __name__ == "__main__":
    main()
