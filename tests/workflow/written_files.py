"""Everything that can be read in the files of a folder, for tests that look for what must not be there."""

import gzip
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image


def texts_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file's path relative to the folder, with its name and with its bytes, also as they are unpacked."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        yield relative, relative.as_posix().encode()
        if path.is_symlink():
            yield relative, str(path.readlink()).encode()
        elif path.is_file():
            for content in _unpacked(path.read_bytes()):
                yield relative, content


def files_that_tell(folder: Path, words: list[str]) -> dict[str, set[str]]:
    """Which of the words occur in which files or names of files, whatever their case."""
    found: dict[str, set[str]] = {}
    for path, content in texts_below(folder):
        lower = content.lower()
        for word in words:
            if any(word.lower().encode(encoding) in lower for encoding in ("utf-8", "utf-16-le")):
                found.setdefault(path.as_posix(), set()).add(word)
    return found


def _unpacked(data: bytes) -> Iterator[bytes]:
    yield data
    if data.startswith(b"\x1f\x8b"):
        yield gzip.decompress(data)
    elif data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from (archive.read(name) for name in archive.namelist())
    elif data.startswith(b"\x89PNG"):
        yield repr(Image.open(io.BytesIO(data)).info).encode()
