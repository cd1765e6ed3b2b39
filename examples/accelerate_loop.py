"""A loop with Accelerate: accumulation, clipping, and one selection per epoch."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

import gtcompile

Row = dict[str, torch.Tensor]


def make_model() -> LlamaForCausalLM:
    """Six blocks of width 64, random weights."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def make_data(rows: int) -> list[Row]:
    """Sequences of 32 tokens that count upwards by 3."""
    tokens = (torch.randint(0, 256, (rows, 1)) + 3 * torch.arange(32)) % 256
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> list[float]:
    """Train for three epochs of ten optimizer steps; returns the loss of the last batch of each."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    # compiler="eager" starts at once; leave it out for generated code, which is what makes steps fast.
    model = gtcompile.compile_blocks(make_model(), compiler="eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, 3, 30)
    loader = DataLoader(make_data(80), batch_size=4, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    # After prepare: on several processes, these are the objects that know of one another.
    adaptive = gtcompile.AdaptiveBackprop(model, optimizer, budget_fraction=0.5)
    accelerator.register_for_checkpointing(adaptive)  # save_state and load_state then contain its set
    measured = DataLoader(make_data(16), batch_size=4)
    losses = []
    for epoch in range(3):
        selection = adaptive.reselect(measured)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        losses.append(loss.item())
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.3f}, {selection}")
    return losses


if __name__ == "__main__":
    main()
