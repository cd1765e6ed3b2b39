"""What training each block of a model costs, from a configuration alone: no weights, no training."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile


def main() -> dict[str, float]:
    """Print the share of a full step's FLOPs that training each block alone takes, and return it."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    with torch.device("meta"):  # parameters have shapes and no memory
        model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, **sizes))
    tokens = torch.zeros(4, 128, dtype=torch.long)  # the batch is an ordinary one; only its shape matters
    costs = gtcompile.backward_costs(model, {"input_ids": tokens, "labels": tokens})

    print(f"forward {costs.forward_flops:.3e} FLOPs, full step {costs.full_flops:.3e}")
    print(f"smallest budget that trains anything: {costs.minimum_budget_fraction:.3f}")
    names = [name for name, _ in model.named_parameters()]
    shares = {}
    for index in range(sizes["num_hidden_layers"]):
        block = {name for name in names if name.startswith(f"model.layers.{index}.")}
        shares[f"block {index}"] = costs.step_flops(block) / costs.full_flops
    for block, share in shares.items():  # low blocks cost more: the backward has to reach them
        print(f"{block} {'█' * round(40 * share)} {share:.3f}")
    return shares


if __name__ == "__main__":
    main()
