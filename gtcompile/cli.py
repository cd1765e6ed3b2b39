"""The `gtcompile` command: check the options, call a tool, and print its result or one line on what is wrong.

This module, and every check that it makes, imports neither torch nor transformers: a mistake is refused at
once. Each command imports its tool after that.
"""

import contextlib
import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import gtcompile
from gtcompile.costs.budgets import BudgetOf
from gtcompile.errors import BudgetError, GTCompileError
from gtcompile.tools.bench.options import BenchOptions
from gtcompile.tools.common.options import BatchShape, check_model, is_run, parse_list
from gtcompile.tools.common.terminal import say
from gtcompile.tools.compare.arms import ARMS
from gtcompile.tools.compare.datasets import FILES
from gtcompile.tools.compare.options import CompareOptions, CompilerOrNone
from gtcompile.tools.inspect.options import DEFAULT_BUDGET, Outputs, PlanOptions
from gtcompile.tools.onnx.options import ExportOptions
from gtcompile.tools.runs.given_settings import given_settings
from gtcompile.tools.runs.settings import Compiler, CompilerOrAuto, Policy, Settings, source_of

if TYPE_CHECKING:
    from gtcompile.tools.finetune.summary import Summary

app = typer.Typer(
    help="Fine-tune language models within a FLOPs budget.", no_args_is_help=True, add_completion=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gtcompile {gtcompile.__version__}")
        raise typer.Exit


@app.callback()
def _commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Fine-tune language models within a FLOPs budget."""


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text)


MODEL_HELP = "Hub id, local directory (a config alone is enough to inspect), or demo."
SUBJECT_HELP = (
    "Hub id, directory (a config is enough), demo, module:function, or the output folder of finetune."
)
EXPORT_HELP = "Hub id, directory with weights, demo, module:function, or the output folder of finetune."
DATASET_HELP = (
    "demo, scitldr, aclsum, dialogsum, webquestions, piqa, a .jsonl, .json, .csv or .parquet file, or "
    "owner/name of a dataset on the hub."
)

DataDir = Annotated[str | None, _option("Folder with the dataset's files. Default: from the hub.")]
Budget = Annotated[float, _option("Share of a full step's FLOPs that may be spent, forward included.")]
Tokenizer = Annotated[
    str | None, _option("Hub id or folder of a tokenizer, or bytes for one token per byte.")
]
SourceField = Annotated[str | None, _option("Field of your own data that holds the text. Default: source.")]
TargetField = Annotated[str | None, _option("Field of your own data that holds the answer. Default: target.")]
TrainSplit = Annotated[str | None, _option("Split to train on, or a share of one, such as valid[:80%].")]
MaxLength = Annotated[int, _option("Longest sequence in tokens; batches are no longer than the data needs.")]
BatchSize = Annotated[int, _option("Examples per step.")]
MaxNewTokens = Annotated[int | None, _option("Longest answer in tokens. Default: set by the dataset.")]


@app.command()
def finetune(
    context: typer.Context,
    model: Annotated[str | None, _option(MODEL_HELP)] = None,
    dataset: Annotated[str | None, _option(DATASET_HELP)] = None,
    budget: Budget = 0.5,
    budget_of: Annotated[
        BudgetOf, _option("What --budget is a share of. Default: step, with --lora full_finetuning.")
    ] = "step",
    budget_seconds: Annotated[
        float | None, _option("Seconds a step may take, by steps timed on this machine; needs policy best.")
    ] = None,
    budget_memory: Annotated[
        int | None,
        _option("Bytes for saved values, gradients and optimizer state together; needs policy best."),
    ] = None,
    policy: Annotated[
        Policy, _option("How what is trained is selected within the budget; full trains everything.")
    ] = "best",
    lora: Annotated[
        int | None, _option("Train low-rank adapters of this rank instead of weights; needs peft.")
    ] = None,
    lora_alpha: Annotated[
        int | None, _option("Scale adapters by this over their rank. Default: twice the rank.")
    ] = None,
    target_modules: Annotated[
        str | None, _option("Layers that get adapters, such as q_proj,v_proj. Default: all-linear.")
    ] = None,
    output: Annotated[Path | None, _option("Empty or new folder. Default: a new one in runs/.")] = None,
    resume: Annotated[
        Path | None, _option("Continue the run in this folder, with its settings; --epochs extends it.")
    ] = None,
    compare_full: Annotated[
        bool, _option("Then run full fine-tuning from the same start, into OUTPUT/full.", "--compare-full")
    ] = False,
    dry_run: Annotated[
        bool, _option("Make the first selection, print what it costs, and train nothing.", "--dry-run")
    ] = False,
    config: Annotated[
        Path | None, _option("YAML file with any of these settings, or the run.json of a run.")
    ] = None,
    args: Annotated[
        list[str] | None, _option("name=value of transformers' TrainingArguments. May be repeated.")
    ] = None,
    data_dir: DataDir = None,
    source_field: SourceField = None,
    target_field: TargetField = None,
    train_split: TrainSplit = None,
    eval_split: Annotated[str | None, _option("Split to evaluate on, or a share of one.")] = None,
    max_train_samples: Annotated[int | None, _option("Train on at most this many examples.")] = None,
    max_eval_samples: Annotated[int | None, _option("Evaluate on at most this many examples.")] = None,
    epochs: Annotated[int, _option("Passes over the training examples.")] = 5,
    batch_size: BatchSize = 4,
    lr: Annotated[
        float | None,
        _option("Learning rate at the first step; falls linearly to 0. Default: 2e-5, with --lora 2e-4."),
    ] = None,
    weight_decay: Annotated[float, _option("Weight decay of AdamW.")] = 1e-2,
    reselect_every: Annotated[int, _option("Epochs between selections.")] = 1,
    max_length: MaxLength = 512,
    max_new_tokens: MaxNewTokens = None,
    num_beams: Annotated[int, _option("Beams of generation; 1 is greedy.")] = 1,
    tokenizer: Tokenizer = None,
    compiler: Annotated[
        CompilerOrAuto, _option("auto generates code (inductor) if that takes less time than it saves.")
    ] = "auto",
    activation_memory_budget: Annotated[
        float, _option("Share of the bytes saved for backward that may be kept; the rest is recomputed.")
    ] = 1.0,
    prefix_cache: Annotated[
        str | None,
        _option("Keep what frozen blocks near the input compute: memory, or a folder."),
    ] = None,
    labelled_logits: Annotated[
        bool, _option("Compute the head and the loss at labelled positions alone.", "--labelled-logits")
    ] = False,
    grid_intensity: Annotated[
        float | None, _option("Grams of CO2 equivalent per kWh of your grid: prints the run's carbon.")
    ] = None,
    watts: Annotated[
        float | None, _option("What the machine draws, to estimate energy where no counter measures it.")
    ] = None,
    seed: Annotated[int, _option("Seed of dropout and of the order of examples.")] = 0,
) -> None:
    """Fine-tune a model within a FLOPs budget and compare with full fine-tuning."""
    given = {
        name: value
        for name, value in locals().items()
        if name in SETTINGS and context.get_parameter_source(name).name == "COMMANDLINE"  # type: ignore[union-attr]
    }
    with _errors_in_one_line():
        settings = given_settings(
            given, args or (), config=config, output=output, resume=resume, dry_run=dry_run
        )
        _quiet()
        _finetune(Console(), settings, output, resume, compare_full=compare_full, dry_run=dry_run)


SETTINGS = frozenset(field.name for field in dataclasses.fields(Settings)) - {"args"}
"""The options of `finetune` from which a run can be repeated."""


def _finetune(
    console: Console,
    settings: Settings,
    output: Path | None,
    resume: Path | None,
    *,
    compare_full: bool,
    dry_run: bool,
) -> None:
    from gtcompile.tools.finetune import processes, progress, run, summary
    from gtcompile.tools.runs.run_folder import next_free_folder

    with processes.joined_processes() as ranks:
        console.quiet = ranks.rank > 0
        reporter = progress.Reporter(console)
        if dry_run:
            run.plan(settings, reporter, ranks=ranks)
            return
        folder = resume or output or ranks.from_first(lambda: next_free_folder(settings.short_name))
        runs: tuple[Summary, ...]
        try:
            if compare_full and settings.policy != "full":
                runs = run.compare_with_full(settings, folder, reporter, resume=bool(resume), ranks=ranks)
            else:
                runs = (run.finetune(settings, folder, reporter, resume=bool(resume), ranks=ranks),)
        except KeyboardInterrupt as interrupt:
            how_on = f"continue with gtcompile finetune --resume {folder}"
            begun = is_run(folder)
            reporter.say(f"{interrupt or 'interrupted'}; {how_on if begun else 'nothing was written yet'}")
            raise typer.Exit(130) from None
        summary.show(console, runs, folder)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP)],
    budget: Annotated[
        float | None,
        _option("Share of a full step's FLOPs, forward included. Default: 0.5, or the run's plan."),
    ] = None,
    dataset: Annotated[
        str | None, _option(f"Take the batch shape of a run on a dataset: {DATASET_HELP}")
    ] = None,
    batch_size: BatchSize = 4,
    length: Annotated[int, _option("Input tokens per example, without --dataset.")] = 512,
    target_length: Annotated[int, _option("Answer tokens for an encoder-decoder, without --dataset.")] = 64,
    importances: Annotated[
        Path | None, _option("selections.json of a run of this model. Default: the number of elements.")
    ] = None,
    only: Annotated[
        str | None,
        _option("List only parameters with these path segments; layers.1 excludes layers.10.", "--filter"),
    ] = None,
    sort: Annotated[str, _option("name, cost, marginal, importance or size.")] = "cost",
    top: Annotated[int, _option("List at most this many parameters; 0 lists all.")] = 12,
    why: Annotated[
        list[str] | None,
        _option("Explain why a parameter was selected or not, or why a node runs. May be repeated."),
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        _option(
            "Compare two trained sets: each an epoch of a run, plan, all, none, or comma-separated patterns."
        ),
    ] = None,
    html: Annotated[Path | None, _option("Write an HTML report to this file.")] = None,
    export: Annotated[
        Path | None, _option("Write the joint graph: .json (Model Explorer), .dot, .graphml or .txt.")
    ] = None,
    json_output: Annotated[bool, _option("Print JSON.", "--json")] = False,
    data_dir: DataDir = None,
    source_field: SourceField = None,
    target_field: TargetField = None,
    train_split: TrainSplit = None,
    max_length: MaxLength = 512,
    max_new_tokens: MaxNewTokens = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Print what a budget would train and what every parameter costs, without training or weights."""
    data: dict[str, Any] = {
        "data_dir": data_dir,
        "source_field": source_field,
        "target_field": target_field,
        "train_split": train_split,
        "max_length": max_length,
        "max_new_tokens": max_new_tokens,
        "tokenizer": tokenizer,
    }
    with _errors_in_one_line():
        shape = BatchShape(batch_size=batch_size, length=length, target_length=target_length)
        options = PlanOptions(budget=budget, shape=shape, importances=importances)
        wanted = Outputs(
            only=only,
            order=sort,
            top=top,
            why=tuple(why or ()),
            diff=diff,
            html=html,
            export=export,
            as_json=json_output,
        )
        settings = None
        if dataset is not None:
            share = DEFAULT_BUDGET if budget is None else budget
            settings = Settings(model=model, dataset=dataset, budget=share, batch_size=batch_size, **data)
            source_of(settings)
        _check_model_or_run(model)
        _quiet()
        from gtcompile.tools.inspect import command, outputs

        progress = Console(stderr=True)
        if settings is None:
            result = command.inspect_model(model, options, progress)
        else:
            result = command.inspect_dataset(settings, importances, progress)
        outputs.put_out(outputs.output_console(), result, wanted)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=EXPORT_HELP)],
    onnx: Annotated[Path, _option("File to write the training step to.")],
    train: Annotated[list[str] | None, _option("Pattern of parameters to train. May be repeated.")] = None,
    budget: Annotated[
        float | None, _option("Train the best set within this share of a full step's FLOPs.")
    ] = None,
    optimizer: Annotated[str | None, _option("Include the update of an optimizer: sgd or adamw.")] = None,
    dynamic: Annotated[
        bool, _option("Let the step take other batch sizes and lengths.", "--dynamic")
    ] = False,
    batch_size: BatchSize = 4,
    length: Annotated[int, _option("Input tokens per example.")] = 64,
    target_length: Annotated[int, _option("Answer tokens for an encoder-decoder.")] = 16,
) -> None:
    """Write the training step as plain ONNX: loss and gradients of the trained parameters only."""
    with _errors_in_one_line():
        options = ExportOptions(
            path=onnx,
            train=tuple(train) if train else None,
            budget=budget,
            optimizer=optimizer,  # type: ignore[arg-type]  # checked there
            dynamic=dynamic,
            shape=BatchShape(batch_size=batch_size, length=length, target_length=target_length),
        )
        _check_model_or_run(model)
        _quiet()
        from gtcompile.tools.onnx import command

        say(Console(), str(command.export(model, options)))


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="Hub id, directory (a config is enough), demo, or module:function.")
    ],
    budgets: Annotated[str, _option("Shares of a full step's FLOPs, separated by commas.")] = "0.4,0.5,0.7",
    batch_size: BatchSize = 4,
    length: Annotated[int, _option("Input tokens per example.")] = 512,
    target_length: Annotated[int, _option("Answer tokens for an encoder-decoder.")] = 64,
    compiler: Annotated[Compiler | None, _option("Default: inductor on a GPU, eager on a CPU.")] = None,
    dtype: Annotated[str | None, _option("Weights in float32 or bfloat16. Default: float32.")] = None,
    rounds: Annotated[int, _option("How often every step is timed; 5 or more show what is faster.")] = 9,
    importances: Annotated[
        Path | None, _option("selections.json of a run. Default: random importances.")
    ] = None,
    json_output: Annotated[bool, _option("Print JSON.", "--json")] = False,
) -> None:
    """Compare steps at several budgets with full training and eager freezing, on random weights."""
    with _errors_in_one_line("--budgets"):
        options = BenchOptions(
            budgets=parse_list("budgets", budgets, float, "numbers"),
            shape=BatchShape(batch_size=batch_size, length=length, target_length=target_length),
            compiler=compiler,
            rounds=rounds,
            importances=importances,
            dtype=dtype,
        )
        check_model(model)
        _quiet()
        from gtcompile.tools.bench import command, result

        measured = command.bench(model, options, progress=Console(stderr=True))
        if json_output:
            typer.echo(json.dumps(measured.as_dict(), indent=2))
        else:
            result.show(Console(), measured)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="Hub id, directory with weights, demo, or smollm2.")],
    output: Annotated[
        Path, _option("Folder for runs, table, plots and page; with runs in it, they are continued.")
    ],
    dataset: Annotated[str, _option(f"{', '.join(FILES)}.")] = "scitldr",
    data_dir: Annotated[
        Path | None, _option("Folder with the dataset's files. Default: from the hub.")
    ] = None,
    arms: Annotated[str, _option("Methods, separated by commas.")] = ",".join(ARMS),
    budgets: Annotated[str, _option("Shares of a full step's FLOPs, separated by commas.")] = "0.5",
    seeds: Annotated[str, _option("Seeds, separated by commas.")] = "0,1,2",
    steps: Annotated[int, _option("Optimizer steps at equal steps.")] = 100,
    purposes: Annotated[str, _option("Compare at equal steps, at equal flops, or both.")] = "steps,flops",
    search: Annotated[bool, _option("Choose learning rates at a quarter of the steps.", "--search")] = False,
    batch_size: BatchSize = 8,
    length: Annotated[int, _option("Tokens per text, its answer included.")] = 160,
    answer_length: Annotated[int, _option("Most tokens of an answer; longer ones are cut.")] = 40,
    texts: Annotated[int | None, _option("Texts to train on, in every epoch. Default: all.")] = None,
    held_out: Annotated[int, _option("Held-out texts on which the loss is measured.")] = 64,
    scored: Annotated[
        int,
        _option(
            "Held-out texts that are also answered and scored at the end of a run: by ROUGE, for "
            "webquestions by exact match, for piqa by accuracy."
        ),
    ] = 0,
    evaluations: Annotated[int, _option("How often a run measures this loss.")] = 4,
    selections: Annotated[int, _option("Selections in a run that measures importance.")] = 2,
    measured: Annotated[int, _option("Batches on which each selection measures importance.")] = 4,
    save_every: Annotated[int, _option("Steps between saves of an unfinished run.")] = 20,
    compiler: Annotated[
        CompilerOrNone, _option("Compiler of the blocks; none runs them eagerly.")
    ] = "inductor",
    float32: Annotated[bool, _option("Run without bf16 autocast.", "--float32")] = False,
    dry_run: Annotated[
        bool, _option("Print how many runs are missing, what they cost, and train nothing.", "--dry-run")
    ] = False,
    plots: Annotated[
        bool, _option("Draw plots; without, matplotlib is not needed.", "--plots/--no-plots")
    ] = True,
    device: Annotated[str | None, _option("torch device. Default: a GPU if there is one.")] = None,
    threads: Annotated[int | None, _option("Threads on the CPU. Default: chosen by torch.")] = None,
) -> None:
    """Compare methods of fine-tuning by held-out loss and scores, at equal steps and at equal FLOPs."""
    arguments = dict(locals())
    with _errors_in_one_line("--budgets"):
        lists: dict[str, Any] = {
            "arms": parse_list("arms", arms, str, "names"),
            "budgets": parse_list("budgets", budgets, float, "numbers"),
            "seeds": parse_list("seeds", seeds, int, "whole numbers"),
            "purposes": parse_list("purposes", purposes, str, "names"),
        }
        options = CompareOptions(**arguments | lists)
        check_model(model)
        options.check_output()
        options.check_packages()
        _quiet()
        from gtcompile.tools.compare import command

        command.compare(options, Console())


def _check_model_or_run(model: str) -> None:
    if not is_run(Path(model)):
        check_model(model)


@contextlib.contextmanager
def _errors_in_one_line(budget: str = "--budget") -> Iterator[None]:
    """Print errors that the user can act on without a traceback, and exit with code 2.

    Args:
        budget: name of the option that is `budget_fraction` in Python.
    """
    try:
        yield
    except BudgetError as error:
        text = str(error).replace("budget_fraction", budget)
        for name in ("budget_seconds", "budget_memory"):
            text = text.replace(name, f"--{name.replace('_', '-')}")
        say(Console(stderr=True), f"error: {text}")
        raise typer.Exit(2) from error
    except (GTCompileError, ValueError, ImportError) as error:
        say(Console(stderr=True), f"error: {error}")
        raise typer.Exit(2) from error
    except BrokenPipeError:  # the reader of the output has closed it
        raise
    except OSError as error:
        say(Console(stderr=True), f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        raise typer.Exit(2) from error


def _quiet() -> None:
    """Turn off the progress bars and advice of other libraries."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    # peft 0.21 calls what transformers 5.24 has renamed
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)


def main() -> None:
    """Run the command line."""
    app()
