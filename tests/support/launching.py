"""Start scripts on several ranks, as torchrun does."""

import subprocess
import sys


def torchrun(*arguments: object, ranks: int = 2) -> list[str]:
    """The command that starts a module (`-m`, its name, its arguments) on so many ranks, at a free port."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *launcher, *map(str, arguments)]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and keep what it prints."""
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def run_on_ranks(module: str, *arguments: object, ranks: int = 2) -> str:
    """Run a module of `tests.ranks` to its end; returns what it prints, and fails where a rank does."""
    result = run(torchrun("-m", f"tests.ranks.{module}", *arguments, ranks=ranks))
    assert result.returncode == 0, result.stderr
    return result.stdout
