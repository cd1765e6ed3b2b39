"""Values of a frozen prefix on disk, one file per example, which later runs use as well.

A file that cannot be read, or whose contents do not match their checksum, is deleted and its example computed
again. Files are written under another name first, so that a kill leaves no half-written one and several runs
may share a folder. Other files and folders there are neither counted nor deleted.
"""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from gtcompile.files import write_atomically

logger = logging.getLogger(__name__)

_NAME = "hidden"
_CHECKSUM = "blake2b"
_UNFINISHED_FOR = 3600.0
"""Seconds after which a file that is still under its temporary name is one that nobody will finish."""
_FOLDER = re.compile("[0-9a-f]{32}")
"""Names of the folders of prefixes."""
_FILE = re.compile(r"[0-9a-f]{32}\.safetensors|\.[0-9a-f]{32}\.safetensors\.\w+")
"""Names of the files in them; one that is being written has its temporary name."""


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
        max_bytes: of the files of all prefixes in the folder. To stay below it, files of other prefixes are
            deleted, the least recently used prefix first; then nothing more is written.
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
            self._bytes = self._size()
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
        content = save({_NAME: tensor}, {_CHECKSUM: digest_of(tensor).hex()})
        try:
            if self._make_room(len(content)):
                write_atomically(self._path(key), lambda path: path.write_bytes(content), durable=False)
                self._bytes += len(content)
        except OSError as error:
            self._stop_writing(error)

    def _stop_writing(self, error: OSError) -> None:
        self._writes = False
        logger.warning("no more values of the frozen prefix are written to %s: %s", self._folder, error)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.safetensors"

    def _make_room(self, size: int) -> bool:
        if self._bytes + size <= self._max_bytes:
            return True
        others = [path for path in _prefixes(self._shared) if path != self._folder]
        for other in sorted(others, key=_last_used):
            shutil.rmtree(other, ignore_errors=True)
            self._bytes = self._size()
            if self._bytes + size <= self._max_bytes:
                return True
        return False

    def _size(self) -> int:
        """Bytes of all files of prefixes; what another run deletes meanwhile does not count."""
        total = 0
        for folder in {self._folder, *_prefixes(self._shared)}:
            for path in _files_in(folder):
                with contextlib.suppress(FileNotFoundError):
                    total += path.stat().st_size
        return total


def _prefixes(shared: Path) -> Iterator[Path]:
    """The folders that hold files of prefixes and nothing else, so that they are ours to delete."""
    for path in shared.iterdir():
        if _FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with contextlib.suppress(FileNotFoundError):  # another run may delete it first
                with os.scandir(path) as inside:
                    ours = all(_FILE.fullmatch(each.name) and not each.is_dir() for each in inside)
                if ours:
                    yield path


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("*") if _FILE.fullmatch(path.name))


def _last_used(folder: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return folder.stat().st_mtime
    return 0.0


def _delete_unfinished(folder: Path) -> None:
    """Delete what killed runs left; a younger file may be one that another run is writing now."""
    for path in _files_in(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.name.startswith(".") and time.time() - path.stat().st_mtime > _UNFINISHED_FOR:
                path.unlink()
