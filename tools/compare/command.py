"""`gtcompile compare`: fine-tuning methods on one model and data set.

Each finished run is appended to `runs.jsonl` in the output folder. The command can be stopped at any time and
started again: finished runs are kept, and an unfinished run continues from its last save. The table and the
plots are rewritten after every run.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from gtcompile.tools.common.terminal import say
from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.options import CompareOptions
from gtcompile.tools.compare.records import Records, Row
from gtcompile.tools.compare.report import write_table
from gtcompile.tools.compare.run import Run, Setting, full_costs, run
from gtcompile.tools.compare.text_batches import Batches, demo_data, read_scitldr
from gtcompile.tools.models.loading import load_language_model
from gtcompile.tools.runs.preparation import default_device

_SEARCHED = (0.5, 1.0, 2.0)
"""Factors of a method's known learning rate that a search tries."""


def compare(options: CompareOptions, console: Console) -> None:
    """Do the missing runs, then write the table and the plots.

    Args:
        options: what to compare.
        console: where to print the result of each run.

    Raises:
        ValueError: the model could not be loaded, this machine lacks the device, the texts fill no batch, or
            the output folder holds runs with other options.
        GTCompileError: the model cannot be captured, or a budget is too small.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.check_output()
    setting = _setting(options)
    options.output.mkdir(parents=True, exist_ok=True)
    options.setting_file.write_text(json.dumps(options.setting(), indent=1), "utf-8")
    records = Records(options.output / "runs.jsonl", console)
    full = full_costs(setting)

    def finish(chosen: Run) -> Row:
        if chosen.key not in records.rows:
            say(console, f"running {chosen.key}")
            records.add(run(chosen, setting, full, options.output / "unfinished" / chosen.key))
            _report(records, options)
        row = records.rows[chosen.key]
        say(console, f"{chosen.key}: loss {row['loss']:.4f}, {row['flops_fraction']:.3f} of full FLOPs")
        return row

    for chosen in _planned(options, finish):
        finish(chosen)
    _report(records, options)
    plots = ", the plots are in the same folder" if options.plots else ""
    say(console, f"The table is in {options.output / 'table.md'}{plots}.")


def _report(records: Records, options: CompareOptions) -> None:
    compared = [row for row in records.rows.values() if row["purpose"] != "search"]
    write_table(compared, options.output)
    if options.plots and compared:
        from gtcompile.tools.compare.plots import write_plots

        write_plots(compared, options.output)


def _setting(options: CompareOptions) -> Setting:
    tokenizer = load_language_model(options.model, weights=False).tokenizer
    device = _device(options.device or default_device())

    def load() -> nn.Module:
        model = load_language_model(options.model).model
        model.config.use_cache = False
        moved: nn.Module = model.to(device)  # type: ignore[arg-type]
        return moved

    data = demo_data() if options.data_dir is None else read_scitldr(options.data_dir)
    return Setting(
        load=load,
        batches=Batches(tokenizer, size=options.batch_size, length=options.length),
        data=replace(data, train=data.train[: options.texts]),
        held_out=options.held_out,
        evaluations=options.evaluations,
        selections=options.selections,
        measured=options.measured,
        bf16=not options.float32,
        compiler=None if options.compiler == "none" else options.compiler,
        save_every=options.save_every,
        device=device,
    )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise ValueError(f"--device: this machine has no torch device {name!r}") from error


def _planned(options: CompareOptions, finish: Callable[[Run], Row]) -> Iterator[Run]:
    """The runs in order: all methods with the first seed before any with the next."""
    for seed in options.seeds:
        for purpose in options.purposes:
            for name in options.arms:
                for budget in options.budgets if ARMS[name].budgeted else [None]:
                    rate = _learning_rate(name, budget, options, finish)
                    first = Run(
                        arm=name,
                        budget=budget,
                        learning_rate=rate,
                        seed=seed,
                        steps=options.steps,
                        purpose="steps",
                    )
                    if purpose == "steps":
                        yield first
                    else:  # as many steps as the FLOPs of full fine-tuning pay for
                        known = None if ARMS[name].cached else budget
                        alike = replace(first, seed=options.seeds[0])  # all seeds run for as many steps
                        fraction = known or finish(alike)["flops_fraction"]
                        yield replace(first, steps=round(options.steps / fraction), purpose="flops")


def _learning_rate(
    name: str, budget: float | None, options: CompareOptions, finish: Callable[[Run], Row]
) -> float:
    """The arm's known learning rate, or the best of three on data of their own."""
    arm = ARMS[name]
    if not options.search:
        return arm.learning_rate
    tried = [
        Run(
            arm=name,
            budget=budget,
            learning_rate=factor * arm.learning_rate,
            seed=options.seeds[0],
            steps=max(1, options.steps // 4),
            purpose="search",
        )
        for factor in _SEARCHED
    ]
    return min(tried, key=lambda chosen: finish(chosen)["loss"]).learning_rate
