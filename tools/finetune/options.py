"""The options of `gtcompile finetune` that are not settings of the run; checked before torch is imported."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gtcompile.tools.common.options import expect
from gtcompile.tools.runs.run_folder import RunFolder
from gtcompile.tools.runs.settings import Settings

LOG_TARGETS = ("tensorboard",)
"""Values of `--log-to`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Where a run writes, and how it starts."""

    output: Path | None = None
    """Folder of the run; None takes a new one."""
    resume: bool = False
    """Whether to continue the run in `output`."""
    compare_full: bool = False
    """Whether to run full fine-tuning afterwards, into `output/full`."""
    log_to: str | None = None
    """`tensorboard`, or None for no trace."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            ValueError: naming the option.
        """
        check_log_target(self.log_to)
        if self.resume and self.output is None:
            raise ValueError("--resume continues the run in --output; pass the folder")

    def check_output(self, settings: Settings, *, besides: Collection[str] = ()) -> None:
        """Refuse an output folder that is not empty, or to resume from one without a run with these settings.

        Args:
            settings: of the run.
            besides: names of settings that are not known yet.

        Raises:
            ValueError: naming the folder.
        """
        if self.output is None:
            return
        folder = RunFolder(self.output)
        if self.resume:
            folder.check_same_run(settings, besides=besides)
        else:
            folder.check_new()


def check_log_target(target: str | None) -> None:
    """Refuse an unknown `--log-to`.

    Raises:
        ValueError: listing the known values.
    """
    expect(target is None or target in LOG_TARGETS, "log_to", ", ".join(LOG_TARGETS), target)
