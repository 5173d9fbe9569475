"""Tar files in WebDataset's layout: `KEY.json`, `KEY.target.png`, `KEY.ref1.png`, `KEY.mask1.png` …

Nothing is unpacked to disk. An index of the members stays in memory; each picture is read from its offset.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final
from urllib.parse import quote, unquote

import orjson

from workers.pictures import encode
from workers.training.datasets.faults import Code, Fault, UnusableFileError, Where
from workers.training.datasets.source import Source, flaws
from workers.training.records import Record

PICTURE_SUFFIXES: Final = ("png", "jpg", "jpeg", "webp")
_PART: Final = re.compile(rf"(json)|(target|(?:ref|mask)[1-9])\.(?:{'|'.join(PICTURE_SUFFIXES)})")
_TAR_ERRORS: Final = (tarfile.TarError, OSError, ValueError, OverflowError, EOFError, MemoryError)


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a tar: its name there, and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass(slots=True)
class ShardSample:
    """The members of one key, by part: `json`, `target`, `ref1` …; and what is wrong with them already.

    Attributes:
        row: 1-based, by first appearance in the shard.
        base: what the members' names have in common; the key, percent-encoded.
    """

    row: int
    base: str
    members: dict[str, Member] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The key as it was before encoding."""
        return unquote(self.base)


def index_shard(path: Path) -> tuple[list[ShardSample], Fault | None]:
    """The samples of a shard in order of appearance, and why the rest of it cannot be read, if so."""
    samples: dict[str, ShardSample] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                if not info.isdir():
                    _sort_in(info, samples, path.name)
            found = _after_last(path, archive.offset)
    except _TAR_ERRORS as error:
        found = str(error).partition("\n")[0][:200] or type(error).__name__
    return list(samples.values()), Fault(Where(path.name), "", "shard_damaged", found) if found else None


def _after_last(path: Path, offset: int) -> str:
    """What is wrong behind the last member, which tarfile does not say: it takes damage there for the end."""
    with path.open("rb") as handle:
        handle.seek(offset)
        if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            return "no end mark"
        while rest := handle.read(2**16):
            if rest.strip(b"\0"):
                return "more data after the end mark"
    return ""


def _sort_in(info: tarfile.TarInfo, samples: dict[str, ShardSample], file: str) -> None:
    folder, _, name = info.name.removeprefix("./").rpartition("/")
    stem, _, ending = name.partition(".")
    base = f"{folder}/{stem}" if folder else stem
    sample = samples.setdefault(base, ShardSample(len(samples) + 1, base))
    match = _PART.fullmatch(ending)
    part = (match[1] or match[2]) if match else None
    code: Code | None = None
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or info.issparse():
        code = "member_not_regular"
    elif info.name.startswith("/") or ".." in info.name.split("/"):
        code = "path_escape"
    elif part is None:
        code = "unknown_field"
    elif part in sample.members:
        code = "duplicate_key"
    else:
        sample.members[part] = Member(info.name, info.offset_data, info.size)
    if code is not None:
        sample.faults.append(Fault(Where(file, sample.row), info.name, code))


def read_member(path: Path, member: Member, max_bytes: int) -> bytes:
    """A member's bytes.

    Raises:
        UnusableFileError: `image_too_large`, `file_unreadable`.
    """
    if member.size > max_bytes:
        raise UnusableFileError("image_too_large", f"{member.name}, {member.size} bytes")
    try:
        with path.open("rb") as handle:
            handle.seek(member.offset)
            data = handle.read(member.size)
    except OSError as error:
        raise UnusableFileError("file_unreadable", f"{path.name}, {os.strerror(error.errno or 0)}") from None
    return data


def write_shard(records: Iterable[Record] | Source[Record], path: Path) -> int:
    """Write records as one shard, pictures lossless; returns their number. Equal records give equal bytes.

    The file appears whole or not at all. Keys may be any text: members bear them percent-encoded.

    Raises:
        ValueError: a record that would not be read back: its key is empty or a repetition, a placeholder has no
            reference, a mask does not fit.
        OSError: the disk's.
    """
    draft = path.with_name(f".{path.name}.part")
    keys: set[str] = set()
    try:
        with draft.open("wb") as handle:
            with tarfile.open(fileobj=handle, mode="w", format=tarfile.PAX_FORMAT) as archive:
                for record in records:
                    _refuse_unreadable(record, keys)
                    keys.add(record.key)
                    for name, data in _members(record):
                        _add(archive, name, data)
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return len(keys)


def _refuse_unreadable(record: Record, keys: set[str]) -> None:
    if not record.key or record.key in keys:
        raise ValueError(f"record key {record.key!r} is {'there already' if record.key else 'empty'}")
    if not record.task:
        raise ValueError(f"record {record.key!r} has no task")
    for name, code, found in flaws(record):
        raise ValueError(f"record {record.key!r}: {name}: {code} {found}")


def _members(record: Record) -> Iterable[tuple[str, bytes]]:
    base = quote(record.key, safe="").replace(".", "%2E")
    references = [{"slot": each.slot, "role": each.role.value} for each in record.references]
    yield f"{base}.json", orjson.dumps({"task": record.task, "prompt": record.prompt, "references": references})
    yield f"{base}.target.png", encode(record.target, "png")
    for each in record.references:
        yield f"{base}.ref{each.slot}.png", encode(each.pixels, "png")
        if each.target_mask is not None:
            yield f"{base}.mask{each.slot}.png", encode(each.target_mask, "png")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    stream: IO[bytes] = io.BytesIO(data)
    archive.addfile(info, stream)
