"""LoRA that freezes block after block: adapters of all blocks at first, fewer and fewer later."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import gtcompile

STEPS = 60


def make_model() -> torch.nn.Module:
    """Six blocks of width 64 with adapters on all linear layers; random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def make_batch() -> dict[str, torch.Tensor]:
    """Sequences that count upwards by 3; only their second half has labels."""
    tokens = (torch.randint(0, 32, (16, 1)) + 3 * torch.arange(32)) % 32
    labels = tokens.clone()
    labels[:, :16] = -100
    return gtcompile.add_labelled_positions({"input_ids": tokens, "labels": labels})


def main() -> tuple[list[int], float]:
    """Train; returns how many parameters each step trained, and the mean share of a full step's FLOPs."""
    torch.manual_seed(0)
    model = make_model()
    gtcompile.only_labelled_logits(model)
    gtcompile.compile_blocks(model, compiler="eager")  # leave it out for generated code
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    policy = gtcompile.policies.Progressive(steps=STEPS)
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, budget_fraction=0.8, policy=policy)
    adaptive.reselect([make_batch()])
    trained, shares = [], []
    for step in range(STEPS):
        trained.append(len(gtcompile.trained_parameters(model)))
        shares.append(adaptive.step_fraction)
        loss = model(**make_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        adaptive.step()  # the set for the next step; nothing is compiled
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {trained[-1]} parameters trained")
    return trained, sum(shares) / STEPS


if __name__ == "__main__":
    main()
