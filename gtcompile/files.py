"""Write a file so that readers find the old content or the new one, never a part."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object], *, durable: bool = True) -> None:
    """Let `write` fill a temporary file next to `path`, then move it to `path` in one step.

    If anything fails, `path` keeps its old content. A kill may leave the temporary file, whose name begins
    with `.`, the name of `path` and another `.`.

    Args:
        path: in a folder that exists.
        write: gets the path of the temporary file.
        durable: whether the content must be on the disk first, so that a power failure leaves no part of it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The permissions that the user withholds from new files; temporary files get fewer."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
