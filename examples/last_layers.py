"""How many of the last blocks a budget pays for, and what the best set at the same budget is."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile

BLOCKS = 8


def main() -> dict[float, tuple[int, float]]:
    """Per budget: the number of last blocks that fit, and the share of FLOPs the best set takes."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
    }
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes))
    tokens = torch.zeros(4, 128, dtype=torch.long)
    costs = gtcompile.backward_costs(model, {"input_ids": tokens, "labels": tokens})
    names = [name for name, _ in model.named_parameters()]

    def last(count: int) -> set[str]:
        kept = [f"model.layers.{index}." for index in range(BLOCKS - count, BLOCKS)]
        return {name for name in names if name.startswith(("model.norm", "lm_head", *kept))}

    # A stand-in for measure_importance, which needs weights and data: every parameter counts by its size.
    importance = {name: float(parameter.numel()) for name, parameter in model.named_parameters()}
    result = {}
    for budget in (0.4, 0.5, 0.6, 0.7, 0.8):
        fitting = [n for n in range(BLOCKS + 1) if costs.step_flops(last(n)) <= budget * costs.full_flops]
        selection = gtcompile.select_parameters(costs, importance, budget)
        result[budget] = max(fitting, default=0), selection.step_flops / costs.full_flops
        print(f"budget {budget}: the last {result[budget][0]} of {BLOCKS} blocks fit; best set: {selection}")
    return result


if __name__ == "__main__":
    main()
