"""What a file's own headers promise of its length, in bytes; a copy that broke off holds less."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

BOXES = frozenset(b"ftyp styp moov moof mdat mfra free skip wide sidx meta uuid udta pdin emsg prft".split())
"""Top-level boxes of MP4 and MOV (ISO 14496-12); bytes after the last of them promise nothing."""
EBML, SEGMENT = 0x1A45DFA3, 0x18538067
"""Element ids of Matroska (RFC 9559)."""
METADATA = 1 << 16
"""FLV's onMetaData lies within so many bytes."""


def promised_bytes(path: Path) -> int | None:
    """How long the file says it is, in bytes; None where its format, or whoever wrote it, says nothing.

    MP4 and MOV say it box by box, Matroska and WebM in the size of their segment, AVI and WebP in their RIFF chunks, FLV in
    `filesize` of its metadata. Reads headers only.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            return _riff(file)
        if head[:4] == EBML.to_bytes(4, "big"):
            return _matroska(file)
        if head[:3] == b"FLV":
            return _flv(file)
        if head[4:8] in BOXES:
            return _boxes(file)
    return None


def _riff(file: BinaryIO) -> int | None:
    """The end of the last of the RIFF chunks: a long AVI has several (OpenDML)."""
    end = 0
    while True:
        file.seek(end)
        head = file.read(8)
        size = int.from_bytes(head[4:], "little")
        if len(head) < 8 or head[:4] != b"RIFF" or size in (0, 0xFFFFFFFF):
            return end or None
        end += 8 + size + size % 2


def _boxes(file: BinaryIO) -> int | None:
    end = 0
    while True:
        file.seek(end)
        head = file.read(16)
        if len(head) < 8 or head[4:8] not in BOXES:
            return end or None
        size = int.from_bytes(head[:4], "big")
        if size == 1:
            size = int.from_bytes(head[8:16], "big")
        if size < 8:  # 0: the box goes on to the end, wherever that is.
            return end or None
        end += size


def _matroska(file: BinaryIO) -> int | None:
    """The end of the first segment."""
    file.seek(0)
    while True:
        found, size = _vint(file, keep=True), _vint(file, keep=False)
        if found is None or size is None:
            return None
        if found == SEGMENT:
            return file.tell() + size
        file.seek(size, 1)


def _vint(file: BinaryIO, keep: bool) -> int | None:
    """An id (`keep` its length marker) or a size, of 1 to 8 bytes; None at the end, and for a size that is left unknown."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big")
    if keep:
        return value
    value &= (1 << 7 * length) - 1
    return None if value == (1 << 7 * length) - 1 else value


def _flv(file: BinaryIO) -> int | None:
    file.seek(0)
    head, name = file.read(METADATA), b"\x00\x08filesize\x00"
    start = head.find(name)
    if start < 0 or len(head) < start + len(name) + 8:
        return None
    (size,) = struct.unpack_from(">d", head, start + len(name))
    return int(size) if 0 < size < 1 << 62 else None
