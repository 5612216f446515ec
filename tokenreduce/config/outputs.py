"""Files that we make: checked before work begins, whole or not there at all, and never over another one unasked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenreduce.config.json_source import shown
from tokenreduce.errors import TokenReduceError

PART = ".part"
"""How the names of half files end."""


def unwritable(path: Path, error: OSError) -> TokenReduceError:
    """The error for a path that cannot be written."""
    return TokenReduceError(f"{shown(path)} cannot be written: {error.strerror or error}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`, of a name of its own, for the block to fill; it becomes `path` at the end, or goes.

    Whoever reads `path` finds the old file or the new one, whole. OSErrors pass.
    """
    handle, name = tempfile.mkstemp(suffix=PART, prefix=".", dir=path.parent)
    part = Path(name)
    try:
        os.close(handle)
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_file(path: Path, text: str) -> None:
    """Write a text file by `replacing`."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def reserve_file(path: Path, force: bool) -> bool:
    """Make sure that `path` can be written, before any work: an empty file stands there after this, or the old one.

    Returns whether the empty file is new. Raises TokenReduceError where something is there and `force` is not, a folder or a
    dangling link too, or where nothing can be written.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        return True
    except FileExistsError:
        if path.is_dir():
            raise TokenReduceError(f"{shown(path)} cannot be written: Is a directory") from None
        if not force:
            raise TokenReduceError(f"{shown(path)} exists; give another --output, or --force to overwrite it") from None
        if path.is_symlink() and not path.exists():
            raise TokenReduceError(f"{shown(path)} cannot be written: it is a link to nothing") from None
        if path.exists() and not path.is_file():
            raise TokenReduceError(f"{shown(path)} cannot be written: it is not a regular file") from None
        if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
            raise TokenReduceError(f"{shown(path)} cannot be written: Permission denied") from None
        return False
    except (OSError, ValueError) as error:
        raise TokenReduceError(
            f"{shown(path)} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None


@contextmanager
def reserved(path: Path | None, force: bool) -> Iterator[None]:
    """`reserve_file` for the block (nothing for None); where the block fails, what was reserved and not filled goes."""
    new = path is not None and reserve_file(path, force)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if new and path is not None and not path.stat().st_size:
                path.unlink()
        raise


def reserve_folder(folder: Path, force: bool) -> list[Path]:
    """Make `folder` before any work, and write to it once. Returns what is new: the folder and those around it, inmost first.

    Raises TokenReduceError where it exists and `force` is not, or cannot be made or written to.
    """
    made: list[Path] = []
    try:
        if folder.exists() or folder.is_symlink():
            if not folder.is_dir():
                raise TokenReduceError(f"{shown(folder)} exists; give another --output, it is not a folder")
            if not force:
                raise TokenReduceError(f"{shown(folder)} exists; give another --output, or --force to write into it")
        absent = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(absent):
            parent.mkdir(exist_ok=True)
            made.insert(0, parent)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except (OSError, ValueError) as error:
        give_back(made)
        raise TokenReduceError(
            f"{shown(folder)} cannot be written: {getattr(error, 'strerror', None) or error}"
        ) from None
    return made


def give_back(folders: list[Path]) -> None:
    """Remove those of `folders` that are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def file_names(names: list[str], taken: set[str], most: int = 200) -> dict[str, str]:
    """A name on disk for each of `names`: itself, unless it is taken (in any case of letters), too long or unfit for a file."""
    used, chosen = {each.casefold() for each in taken}, {}
    for name in names:
        plain = "".join(each if each.isprintable() and each not in '/\\:*?"<>|' else "_" for each in name).strip(" .")
        short = plain.encode("utf-8", "replace")[:most].decode("utf-8", "ignore") or "arm"
        found, number = short, 2
        while found.casefold() in used:
            found, number = f"{short}-{number}", number + 1
        used.add(found.casefold())
        chosen[name] = found
    return chosen


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
