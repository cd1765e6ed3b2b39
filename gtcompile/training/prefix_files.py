"""Values of a frozen prefix on disk, one file per example, which later runs use as well.

A file that cannot be read, or whose contents do not match their checksum, is deleted and its example computed
again. Files are written under another name first, so that a kill leaves no half-written one and several runs
may share a folder.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

logger = logging.getLogger(__name__)

_NAME = "hidden"
_CHECKSUM = "blake2b"
_UNFINISHED_FOR = 3600.0
"""Seconds after which a file that is still under its temporary name is one that nobody will finish."""


def digest_of(tensor: torch.Tensor) -> bytes:
    """Return 16 bytes that follow from dtype, shape and contents."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    digest.update(bytes_of(tensor))
    return digest.digest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the contents of a tensor of any dtype and device."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def writable_folder(folder: Path) -> Path:
    """Return a folder, which is created if it does not exist.

    Raises:
        ValueError: nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(
            f"folder: expected a folder that can be written to, got {folder}: {error}"
        ) from error


class PrefixFiles:
    """The files of one prefix in a folder that several prefixes share.

    Args:
        folder: created if it does not exist.
        prefix: identifies the computation whose results these are, by its weights among others.
        max_bytes: of all files in the folder. To stay below it, files of other prefixes are deleted, the
            least recently used prefix first; then nothing more is written.
    """

    def __init__(self, folder: Path, prefix: Iterable[bytes], max_bytes: int) -> None:
        identity = hashlib.blake2b(digest_size=16)
        for part in prefix:
            identity.update(part)
        self._shared, self._max_bytes = folder, max_bytes
        self._folder = folder / identity.hexdigest()
        self._writes, self._bytes = True, 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.utime(self._folder)
            _delete_unfinished(self._folder)
            self._bytes = _size(folder)
        except OSError as error:
            self._stop_writing(error)

    def read(self, key: bytes) -> torch.Tensor | None:
        """Return the values of an example on the CPU; None if there are none that are whole."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(_NAME)
                checksum = (file.metadata() or {}).get(_CHECKSUM)
            if checksum == digest_of(tensor).hex():
                return tensor
            problem = "its contents do not match their checksum"
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            problem = str(error)
        logger.warning("%s is deleted and its example computed again: %s", path, problem)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def write(self, key: bytes, tensor: torch.Tensor) -> None:
        """Write the values of an example, as long as the limit and the disk allow it."""
        if not self._writes or self._path(key).exists():
            return
        name = None
        try:
            if not self._make_room(tensor.nbytes):
                return
            handle, name = tempfile.mkstemp(dir=self._folder, prefix=".")
            with os.fdopen(handle, "wb") as file:
                file.write(save({_NAME: tensor}, {_CHECKSUM: digest_of(tensor).hex()}))
            os.replace(name, self._path(key))
            self._bytes += tensor.nbytes
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(name or "")
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        self._writes = False
        logger.warning("no more values of the frozen prefix are written to %s: %s", self._folder, error)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.safetensors"

    def _make_room(self, size: int) -> bool:
        if self._bytes + size <= self._max_bytes:
            return True
        others = [path for path in self._shared.iterdir() if path.is_dir() and path != self._folder]
        for other in sorted(others, key=lambda path: path.stat().st_mtime):  # another run may delete it first
            shutil.rmtree(other, ignore_errors=True)
            self._bytes = _size(self._shared)
            if self._bytes + size <= self._max_bytes:
                return True
        return False


def _delete_unfinished(folder: Path) -> None:
    """Delete what killed runs left; a younger file may be one that another run is writing now."""
    for path in folder.glob(".*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _UNFINISHED_FOR:
                path.unlink()


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; what another run deletes meanwhile does not count."""
    total = 0
    for below, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(below, name)).st_size
    return total
