"""Compares methods of fine-tuning on one model and data set.

`python -m benchmarks.quality.compare --data-dir SCITLDR --output FOLDER` runs every method and appends each
finished run to `FOLDER/runs.jsonl`. It can be stopped at any time and started again: finished runs are kept,
and an unfinished run continues from its last save. The table and the plots in FOLDER are rewritten after
every run. `--tiny` uses the demo model and generated texts, and takes less than a minute.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.arms import ARMS, Arm
from benchmarks.quality.data import Batches, demo_data, read_scitldr
from benchmarks.quality.report import write_report
from benchmarks.quality.runs import Run, Setting, full_costs, run
from gtcompile.tools.models.loading import load_language_model

Row = dict[str, Any]
_SEARCHED = (0.5, 1.0, 2.0)
"""Factors of a method's known learning rate that a search tries."""


def main(arguments: list[str] | None = None) -> None:
    """Do the missing runs, then write the table and the plots."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    _check_same_setting(options)
    setting = _setting(options)
    records = _Records(options.output / "runs.jsonl")
    full = full_costs(setting)

    def finish(chosen: Run) -> Row:
        if chosen.key not in records.rows:
            print(f"running {chosen.key}", flush=True)
            records.add(run(chosen, setting, full, options.output / "unfinished" / chosen.key))
            write_report(list(records.rows.values()), options.output)
        row = records.rows[chosen.key]
        print(f"{chosen.key}: loss {row['loss']:.4f}, {row['flops_fraction']:.3f} of full FLOPs", flush=True)
        return row

    for chosen in _planned(options, finish):
        finish(chosen)
    write_report(list(records.rows.values()), options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for runs, table and plots")
    parser.add_argument("--model", default="smollm2", help="hub id, folder, smollm2 or demo")
    parser.add_argument("--data-dir", type=Path, help="folder with train.jsonl, dev.jsonl, test.jsonl")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps at equal steps")
    parser.add_argument("--purposes", nargs="+", default=["steps", "flops"], choices=["steps", "flops"])
    parser.add_argument(
        "--search", action="store_true", help="choose learning rates at a quarter of the steps"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=160, help="tokens of a text")
    parser.add_argument(
        "--held-out", type=int, default=64, help="held-out texts on which the loss is measured"
    )
    parser.add_argument("--evaluations", type=int, default=4, help="how often a run measures this loss")
    parser.add_argument(
        "--selections", type=int, default=2, help="selections in a run that measures importance"
    )
    parser.add_argument("--measured", type=int, default=4, help="batches on which importance is measured")
    parser.add_argument("--save-every", type=int, default=20, help="steps between saves of an unfinished run")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "eager", "none"])
    parser.add_argument("--float32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tiny", action="store_true", help="demo model, generated texts, a few steps")
    return parser


def _setting(options: argparse.Namespace) -> Setting:
    if options.tiny:
        options.model, options.length, options.held_out = "demo", 48, 8
    elif options.data_dir is None:
        raise SystemExit("expected --data-dir FOLDER with train.jsonl, dev.jsonl and test.jsonl, or --tiny")
    tokenizer = load_language_model(options.model, weights=False).tokenizer
    device = torch.device(options.device)

    def load() -> torch.nn.Module:
        model = load_language_model(options.model).model
        model.config.use_cache = False
        return model.to(device)

    return Setting(
        load=load,
        batches=Batches(tokenizer, size=options.batch_size, length=options.length),
        data=demo_data() if options.tiny else read_scitldr(options.data_dir),
        held_out=options.held_out,
        evaluations=options.evaluations,
        selections=options.selections,
        measured=options.measured,
        bf16=not options.float32 and not options.tiny,
        compiler=None if options.compiler == "none" else options.compiler,
        save_every=options.save_every,
        device=device,
    )


def _planned(options: argparse.Namespace, finish: Callable[[Run], Row]) -> Iterator[Run]:
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
                        fraction = budget or finish(first)["flops_fraction"]
                        yield replace(first, steps=round(options.steps / fraction), purpose="flops")


def _learning_rate(
    name: str, budget: float | None, options: argparse.Namespace, finish: Callable[[Run], Row]
) -> float:
    """The arm's known learning rate, or the best of three on data of their own."""
    arm: Arm = ARMS[name]
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


class _Records:
    """Finished runs by key, one JSON line each. A line that was cut off when the process ended is dropped."""

    def __init__(self, path: Path) -> None:
        self._path, self.rows = path, {}
        for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
            try:
                row: Row = json.loads(line)
            except json.JSONDecodeError:
                print(f"{path}: dropped an incomplete line", flush=True)
                continue
            self.rows[row["key"]] = row
        if path.is_file():
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()), "utf-8")

    rows: dict[str, Row]

    def add(self, row: Row) -> None:
        """Keep a run, on disk before this returns."""
        self.rows[row["key"]] = row
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _check_same_setting(options: argparse.Namespace) -> None:
    """Refuse a folder whose runs are of another model, data or shape: their losses cannot be compared.

    Raises:
        SystemExit: names what differs.
    """
    names = ("model", "batch_size", "length", "held_out", "tiny", "float32", "selections", "measured")
    wanted = {name: getattr(options, name) for name in names} | {"data": str(options.data_dir)}
    path = options.output / "setting.json"
    if not path.is_file():
        path.write_text(json.dumps(wanted, indent=1), "utf-8")
    elif (found := json.loads(path.read_text("utf-8"))) != wanted:
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        raise SystemExit(
            f"{options.output} holds runs with other {', '.join(differing)}; choose another folder"
        )


if __name__ == "__main__":
    main()
