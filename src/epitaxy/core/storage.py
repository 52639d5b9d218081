"""The files themselves: safetensors without a pickle, and replacements that are whole or not there."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import Tensor

from epitaxy.core.errors import EpitaxyError, FormatError


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, flush to disk, then replace: readers see the old file or the new one."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system inside the block name ``path``, not a draft of it or, as on a full disk, nothing."""
    from safetensors import SafetensorError

    try:
        yield
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from error
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except SafetensorError as error:
        reason = str(error).rpartition("I/O error: ")[2]
        raise FormatError(f"{path}: cannot be written ({reason})") from error


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A draft beside ``target`` that becomes the directory ``target`` when the block ends, and is gone when it fails.

    Raises ``EpitaxyError`` when ``target`` exists and is not an empty directory.
    """
    require_free(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            yield draft
            os.chmod(draft, 0o755)
            if target.is_dir():
                target.rmdir()
            os.replace(draft, target)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise


def require_free(target: Path) -> None:
    """Raise when ``target`` exists and is not an empty directory."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        raise EpitaxyError(f"{target}: exists already and is not overwritten; choose another directory")


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises ``FormatError`` on anything else, pickles included."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: {_why_unreadable(path, error)}") from None
    return tensors, metadata


def read_shapes(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and metadata of a safetensors file, without reading its tensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            shapes = {key: tuple(stream.get_slice(key).get_shape()) for key in stream.keys()}  # noqa: SIM118
            return shapes, stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path}: {_why_unreadable(path, error)}") from None


def _why_unreadable(path: Path, error: Exception) -> str:
    if not path.is_file():
        return "no such file"
    start = path.read_bytes()[:4]
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "a pickle, which is never opened; expected safetensors"
    if path.stat().st_size == 0:
        return "the file is empty; expected safetensors"
    return f"truncated or not a safetensors file ({str(error).splitlines()[0]})"
