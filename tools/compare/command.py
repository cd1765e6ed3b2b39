"""`gtcompile compare`: fine-tuning methods on one model and data set.

What the missing runs will cost is printed first. Each finished run is appended to `runs.jsonl` in the output
folder. The command can be stopped at any time and started again: finished runs are kept, and an unfinished
run continues from its last save. The table, the plots and the page are rewritten after every run.
"""

import json
from dataclasses import replace

import torch
from rich.console import Console
from torch import nn

from gtcompile.tools.common.options import expect
from gtcompile.tools.common.terminal import say
from gtcompile.tools.compare.datasets import Data, find_data, read_data
from gtcompile.tools.compare.options import CompareOptions
from gtcompile.tools.compare.page import write_page
from gtcompile.tools.compare.plan import (
    in_words,
    measured_speed,
    missing_work,
    planned,
    remembered_speed,
)
from gtcompile.tools.compare.records import Records, Row
from gtcompile.tools.compare.report import tables_of, values_of, write_table
from gtcompile.tools.compare.run import Run, run
from gtcompile.tools.compare.setting import Costs, Setting
from gtcompile.tools.compare.text_batches import Batches
from gtcompile.tools.models.loading import load_language_model
from gtcompile.tools.runs.preparation import default_device


def compare(options: CompareOptions, console: Console) -> None:
    """Print the cost of the missing runs, do them, then write the table, the plots and the page.

    Args:
        options: what to compare.
        console: where to print the cost and the result of each run.

    Raises:
        ValueError: the data or the model could not be loaded, this machine lacks the device, there are too
            few texts, or the output folder holds runs with other options.
        GTCompileError: the model cannot be captured, or a budget is too small.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.check_output()
    setting = _setting(options)
    say(console, str(setting.data))
    records = Records(options.output / "runs.jsonl", console)
    costs = Costs(setting)
    _print_cost(options, records, setting, costs, console)
    if options.dry_run:
        return
    options.output.mkdir(parents=True, exist_ok=True)
    options.setting_file.write_text(json.dumps(options.setting(), indent=1), "utf-8")

    def finish(chosen: Run) -> Row:
        if chosen.key not in records.rows:
            say(console, f"running {chosen.key}")
            records.add(run(chosen, setting, costs, options.output / "unfinished" / chosen.key))
            _report(records, options, setting)
        row = records.rows[chosen.key]
        values = ", ".join(f"{name} {value:.4g}" for name, value in values_of(row).items())
        say(console, f"{chosen.key}: {values}, {row['flops_fraction']:.3f} of full FLOPs")
        return row

    for chosen in planned(options, finish):
        finish(chosen)
    _report(records, options, setting)
    say(console, f"The results are in {options.output / 'index.html'} and {options.output / 'table.md'}.")


def _print_cost(
    options: CompareOptions, records: Records, setting: Setting, costs: Costs, console: Console
) -> None:
    work = missing_work(options, records.rows, setting, costs)
    say(console, str(work))
    if not work.runs:
        return
    for line in work.methods():
        say(console, line)
    rows = list(records.rows.values())
    speed = remembered_speed(rows) if rows else measured_speed(work.runs[0], setting, costs)
    say(console, f"This takes about {in_words(speed.seconds(work))} on this machine, {speed.origin}.")


def _report(records: Records, options: CompareOptions, setting: Setting) -> None:
    compared = [row for row in records.rows.values() if row["purpose"] != "search"]
    if not compared:
        return
    tables, plots = tables_of(compared), []
    write_table(tables, options.output)
    if options.plots:
        from gtcompile.tools.compare.plots import write_plots

        plots = write_plots(compared, options.output)
    write_page(options, setting.data, tables, plots, values_of(compared[0]))


def _setting(options: CompareOptions) -> Setting:
    data = read_data(*find_data(options.dataset, options.data_dir))
    data = replace(data, train=data.train[: options.texts])
    _check_counts(options, data)
    device = _device(options.device or default_device())
    language = load_language_model(options.model, weights=False)
    if language.encoder_decoder:
        raise ValueError(f"compare needs a decoder, and {options.model} is an encoder-decoder")
    batches = Batches(
        language.tokenizer,
        data.format,
        size=options.batch_size,
        length=options.length,
        answer_length=options.answer_length,
    )
    next(batches.training(data.train, seed=0))  # refuses too few texts at once

    def load() -> nn.Module:
        model = load_language_model(options.model).model
        model.config.use_cache = False
        moved: nn.Module = model.to(device)  # type: ignore[arg-type]
        return moved

    return Setting(
        load=load,
        batches=batches,
        data=data,
        held_out=options.held_out,
        scored=options.scored,
        evaluations=options.evaluations,
        selections=options.selections,
        measured=options.measured,
        bf16=not options.float32,
        compiler=None if options.compiler == "none" else options.compiler,
        save_every=options.save_every,
        device=device,
    )


def _check_counts(options: CompareOptions, data: Data) -> None:
    """Refuse more held-out texts than there are."""
    for name, count in {"held_out": options.held_out, "scored": options.scored}.items():
        split = f"texts of {data.splits.test}"
        expect(count <= len(data.test), name, f"at most {len(data.test)}, the {split}", count)
    if options.search:
        most, split = len(data.search), data.splits.search
        expect(
            options.held_out <= most, "held_out", f"at most {most}, the texts of {split}", options.held_out
        )


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        raise ValueError(f"--device: this machine has no torch device {name!r}") from error
