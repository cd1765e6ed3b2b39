"""The `gtcompile` command: parse, call a tool, print what it returns or one line that says what is wrong."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gtcompile.tools.common.terminal import say
from gtcompile.tools.runs.settings import Compiler, Method, Settings

app = typer.Typer(
    help="Fine-tune language models within a FLOPs budget.", no_args_is_help=True, add_completion=False
)


@app.callback()
def _commands() -> None:
    """Fine-tune language models within a FLOPs budget."""


def _option(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text)


MODEL_HELP = "Hub id, local directory (a config alone is enough to inspect), or demo."
SUBJECT_HELP = (
    "Hub id, directory (a config is enough), demo, module:function, or the output folder of finetune."
)
EXPORT_HELP = "Hub id, directory with weights, demo, module:function, or the output folder of finetune."
DATASET_HELP = "demo, scitldr, dialogsum, webquestions, piqa, or a .jsonl, .json or .csv file."

Dataset = Annotated[str, _option(DATASET_HELP)]
DataDir = Annotated[str | None, _option("Folder with the dataset's files. Default: from the hub.")]
Budget = Annotated[float, _option("Share of a full step's FLOPs that may be spent, forward included.")]
Tokenizer = Annotated[str | None, _option("Another tokenizer, or bytes for one token per byte.")]
SourceField = Annotated[str | None, _option("Field of a file to read. Default: source.")]
TargetField = Annotated[str | None, _option("Field of a file to answer with. Default: target.")]
TrainSplit = Annotated[str | None, _option("Split to learn from, or a share such as valid[:80%].")]
MaxLength = Annotated[int, _option("Tokens of a sequence at most; batches are as long as the data needs.")]
BatchSize = Annotated[int, _option("Examples per step.")]
MaxNewTokens = Annotated[int | None, _option("Tokens of an answer at most. Default: the dataset's.")]


@app.command()
def finetune(
    model: Annotated[str, _option(MODEL_HELP)],
    dataset: Dataset,
    budget: Budget = 0.5,
    method: Annotated[
        Method, _option("The best within the budget, everything, or the last blocks that fit.")
    ] = "adaptive",
    output: Annotated[Path | None, _option("Empty or new folder. Default: a new one in runs/.")] = None,
    resume: Annotated[bool, _option("Continue the run in --output.", "--resume")] = False,
    compare_full: Annotated[
        bool, _option("Then run full fine-tuning from the same start, into OUTPUT/full.", "--compare-full")
    ] = False,
    data_dir: DataDir = None,
    source_field: SourceField = None,
    target_field: TargetField = None,
    train_split: TrainSplit = None,
    eval_split: Annotated[str | None, _option("Split to answer afterwards, or a share of one.")] = None,
    max_train_samples: Annotated[int | None, _option("Examples to learn from at most.")] = None,
    max_eval_samples: Annotated[int | None, _option("Examples to answer at most.")] = None,
    epochs: Annotated[int, _option("Times every example is seen.")] = 5,
    batch_size: BatchSize = 4,
    lr: Annotated[float, _option("Learning rate at the first step; falls linearly to 0.")] = 2e-5,
    weight_decay: Annotated[float, _option("Weight decay of AdamW.")] = 1e-2,
    reselect_every: Annotated[int, _option("Epochs between selections.")] = 1,
    max_length: MaxLength = 512,
    max_new_tokens: MaxNewTokens = None,
    num_beams: Annotated[int, _option("Beams of generation; 1 is greedy.")] = 1,
    tokenizer: Tokenizer = None,
    compiler: Annotated[Compiler | None, _option("Default: inductor on a GPU, eager on a CPU.")] = None,
    activation_memory_budget: Annotated[
        float, _option("Share of what is saved for backward that may be; the rest is computed again.")
    ] = 1.0,
    seed: Annotated[int, _option("Seed of dropout and of the order of examples.")] = 0,
    checkpoint_every: Annotated[int, _option("Steps between checkpoints, beside those at epochs.")] = 500,
    log_to: Annotated[str | None, _option("tensorboard: a trace in OUTPUT/tensorboard.")] = None,
) -> None:
    """Fine-tune a model within a FLOPs budget and compare with full fine-tuning."""
    arguments = dict(locals())
    for name in ("output", "resume", "compare_full", "compiler", "log_to"):
        del arguments[name]
    console = Console()
    with _errors_in_one_line():
        _finetune(
            console,
            arguments,
            output,
            resume=resume,
            compare_full=compare_full,
            compiler=compiler,
            log_to=log_to,
        )


def _finetune(
    console: Console,
    arguments: dict[str, Any],
    output: Path | None,
    *,
    resume: bool,
    compare_full: bool,
    compiler: Compiler | None,
    log_to: str | None,
) -> None:
    if resume and output is None:
        raise ValueError("--resume continues the run in --output; pass the folder")
    from gtcompile.tools.finetune import processes, progress, run, summary
    from gtcompile.tools.runs import preparation, run_folder

    _quiet()
    arguments |= {"compiler": compiler or preparation.default_compiler()}
    with processes.joined_processes() as ranks:
        chosen = Settings(**arguments, processes=ranks.count)
        name = f"{Path(chosen.model).name}-{Path(chosen.dataset).stem}-{chosen.method}"
        folder = output or ranks.from_first(lambda: run_folder.next_free_folder(name))
        console.quiet = ranks.rank > 0
        reporter = progress.Reporter(console)
        how: dict[str, Any] = {"resume": resume, "log_to": log_to, "ranks": ranks}
        runs: tuple[summary.Summary, ...]
        try:
            if compare_full and chosen.method != "full":
                runs = run.compare_with_full(chosen, folder, reporter, **how)
            else:
                runs = (run.finetune(chosen, folder, reporter, **how),)
        except KeyboardInterrupt as interrupt:
            reason = str(interrupt) or "interrupted"
            kept = run_folder.RunFolder(folder).checkpoint.is_file()
            how_on = f"continue with the same command, --resume and --output {folder}"
            reporter.say(f"{reason}; {how_on if kept else 'there is no checkpoint to continue from yet'}")
            raise typer.Exit(130) from None
        summary.show(console, runs, folder)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help=SUBJECT_HELP)],
    budget: Annotated[
        float | None,
        _option("Share of a full step's FLOPs, forward included. Default: 0.5, or the run's plan."),
    ] = None,
    dataset: Annotated[str | None, _option(f"Take the shape of a run on {DATASET_HELP}")] = None,
    batch_size: BatchSize = 4,
    length: Annotated[int, _option("Input tokens per example, without --dataset.")] = 512,
    target_length: Annotated[int, _option("Answer tokens for an encoder-decoder, without --dataset.")] = 64,
    importances: Annotated[
        Path | None, _option("selections.json of a run of this model. Default: a stand-in.")
    ] = None,
    only: Annotated[
        str | None, _option("Parameters with these path segments: layers.1 is not layers.10.", "--filter")
    ] = None,
    sort: Annotated[str, _option("name, cost, marginal, importance or size.")] = "cost",
    top: Annotated[int, _option("Parameters to list at most; 0 for all.")] = 12,
    why: Annotated[
        list[str] | None, _option("A parameter or node: why it is computed, or not. May be repeated.")
    ] = None,
    diff: Annotated[
        tuple[str, str] | None,
        _option("Two trained sets: epochs of a run, plan, all, none, or patterns with commas between."),
    ] = None,
    html: Annotated[Path | None, _option("Write a report to this file, to be opened in a browser.")] = None,
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
    shape = {"batch_size": batch_size, "length": length, "target_length": target_length}
    with _errors_in_one_line():
        from gtcompile.tools.inspect import command, outputs

        wanted = outputs.Outputs(
            only=only,
            order=sort,
            top=top,
            why=tuple(why or ()),
            diff=diff,
            html=html,
            export=export,
            as_json=json_output,
        )
        _quiet()
        if dataset is None:
            result = command.inspect_model(
                model, budget, **shape, importances=importances, progress=Console(stderr=True)
            )
        else:
            share = command.DEFAULT_BUDGET if budget is None else budget
            run = Settings(
                model=model, dataset=dataset, budget=share, batch_size=batch_size, method="full", **data
            )
            result = command.inspect_dataset(run, importances, Console(stderr=True))
        outputs.put_out(outputs.output_console(), result, wanted)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help=EXPORT_HELP)],
    onnx: Annotated[Path, _option("File to write: the training step of the trained set.")],
    train: Annotated[list[str] | None, _option("Pattern of parameters to train; may be repeated.")] = None,
    budget: Annotated[float | None, _option("Train what this share of a full step's FLOPs buys.")] = None,
    optimizer: Annotated[str | None, _option("Include its update: sgd or adamw.")] = None,
    dynamic: Annotated[bool, _option("Other batch sizes and lengths work too.", "--dynamic")] = False,
    batch_size: BatchSize = 4,
    length: Annotated[int, _option("Input tokens per example.")] = 64,
    target_length: Annotated[int, _option("Answer tokens for an encoder-decoder.")] = 16,
) -> None:
    """Write the training step as plain ONNX: loss and gradients of the trained parameters only."""
    with _errors_in_one_line():
        from gtcompile.tools.onnx import command

        _quiet()
        written = command.export(
            model,
            onnx,
            train=train or None,
            budget=budget,
            optimizer=optimizer,
            dynamic=dynamic,
            batch_size=batch_size,
            length=length,
            target_length=target_length,
        )
        say(Console(), str(written))


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="Hub id, directory (a config is enough), demo, or module:function.")
    ],
    budgets: Annotated[str, _option("Shares of a full step's FLOPs, with commas between.")] = "0.4,0.5,0.7",
    batch_size: BatchSize = 4,
    length: Annotated[int, _option("Input tokens per example.")] = 512,
    target_length: Annotated[int, _option("Answer tokens for an encoder-decoder.")] = 64,
    compiler: Annotated[Compiler | None, _option("Default: inductor on a GPU, eager on a CPU.")] = None,
    dtype: Annotated[str | None, _option("Weights in float32 or bfloat16. Default: float32.")] = None,
    rounds: Annotated[int, _option("Times every step is timed; fewer than 5 decide nothing.")] = 9,
    importances: Annotated[Path | None, _option("selections.json of a run. Default: random.")] = None,
    json_output: Annotated[bool, _option("Print JSON.", "--json")] = False,
) -> None:
    """Measure steps at several budgets beside full training and eager freezing, with random weights."""
    with _errors_in_one_line():
        from gtcompile.tools.bench import command
        from gtcompile.tools.runs import preparation

        _quiet()
        result = command.bench(
            model,
            _shares(budgets),
            compiler=compiler or preparation.default_compiler(),
            dtype=dtype,
            rounds=rounds,
            importances=importances,
            progress=Console(stderr=True),
            batch_size=batch_size,
            length=length,
            target_length=target_length,
        )
        if json_output:
            typer.echo(json.dumps(result.as_dict(), indent=2))
        else:
            command.show(Console(), result)


def _shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(dict.fromkeys(float(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ValueError(f"--budgets: expected numbers with commas between, got {text!r}") from None


@contextlib.contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """What the user can act on is printed without a traceback, and the exit code is 2."""
    from gtcompile.errors import GTCompileError

    try:
        yield
    except (GTCompileError, ValueError, ImportError) as error:
        say(Console(stderr=True), f"error: {error}")
        raise typer.Exit(2) from error
    except BrokenPipeError:  # whoever read the output has gone
        raise
    except OSError as error:
        say(Console(stderr=True), f"error: {error.filename or 'input or output'}: {error.strerror or error}")
        raise typer.Exit(2) from error


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def main() -> None:
    """Run the command line."""
    app()
