"""JSON files, plain or gzipped: what is broken is named, and files are written whole or not at all."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from kpig_fast.data.validation import RowError, ValidationReport


def read_rows(path: Path, report: ValidationReport) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON Lines file or of a JSON list, each with its place: ``file:line`` or ``file[index]``.

    What is no object is dropped into ``report``, broken compression is noted there. Blank lines are passed over.
    Raises OSError where the file cannot be read.
    """
    try:
        with _open(path) as file:
            if file.peek(1).lstrip().startswith(b"["):
                rows = ((f"{path}[{n}]", value) for n, value in enumerate(_parse(file.read())))
            else:
                rows = ((f"{path}:{n}", line.strip()) for n, line in enumerate(file, start=1) if line.strip())
            for where, row in rows:
                try:
                    value = as_object(_parse(row) if isinstance(row, bytes) else row)
                except RowError as error:
                    report.drop(where, error)
                else:
                    yield where, value
    except RowError as error:
        report.add(str(path), error)


def read_object(path: Path) -> dict[str, Any]:
    """The one object in a JSON file. Raises RowError where it is none, OSError where the file cannot be read."""
    with _open(path) as file:
        return as_object(_parse(file.read()))


def as_object(value: Any) -> dict[str, Any]:
    """``value``, which a file holds. Raises RowError where it is no JSON object."""
    if not isinstance(value, dict):
        raise RowError("schema", f"row: is a {type(value).__name__}; write one JSON object")
    return value


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines as UTF-8; nobody ever sees half a file. Parent folders are made."""
    write_bytes(path, (f"{line}\n".encode() for line in lines))


def write_bytes(path: Path, pieces: Iterable[bytes]) -> None:
    """Write the pieces one after another; nobody ever sees half a file. Parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _open(path: Path) -> Iterator[BufferedReader | gzip.GzipFile]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RowError("schema", f"file: {error}; fetch or compress it again") from error


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise RowError("schema", f"{place}: {error.msg}; correct the JSON") from error
    except UnicodeDecodeError as error:
        raise RowError("schema", f"byte {error.start + 1}: {error.reason}; save the file as UTF-8") from error
