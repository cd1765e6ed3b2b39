"""The demo: the embedded model on the generated task, at half the FLOPs and in full, side by side."""

import transformers
from rich.console import Console

from gtcompile.tools.common.terminal import say
from gtcompile.tools.finetune import Reporter, compare_with_full, show
from gtcompile.tools.runs.run_folder import next_free_folder
from gtcompile.tools.runs.settings import Settings

SETTINGS = Settings(
    model="demo",
    dataset="demo",
    budget=0.5,
    epochs=2,
    batch_size=16,
    lr=3e-3,
)
"""A model of a million parameters needs a larger learning rate than the paper's models of billions."""


def main() -> None:
    """Run both, and print the comparison."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    console, folder = Console(), next_free_folder("demo")
    try:
        runs = compare_with_full(SETTINGS, folder, Reporter(console))
    except KeyboardInterrupt as interrupt:
        say(console, f"{interrupt or 'interrupted'}; make demo starts again, in a new folder")
        raise SystemExit(130) from None
    show(console, runs, folder)
