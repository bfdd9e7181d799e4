"""Reading files of examples: JSONL, JSON, CSV and text directly, so that errors name the line;
Parquet and hub ids through `datasets`."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lorakit.errors import LorakitError, nearest


@dataclass(frozen=True)
class Record:
    """One row as it stands in the file, and where that is (``train.jsonl, line 7``)."""

    fields: dict[str, Any]
    where: str


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
_KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet")


def read_records(source: str) -> list[Record]:
    """All rows of a file, of every such file in a folder, or of a hub data set.

    Args:
        source: a path (``.jsonl .json .csv .tsv .txt .parquet``, plain or ``.gz``/``.xz``), a
            folder of them, or a hub id, with ``:split`` after it if not ``train``.

    Raises:
        LorakitError: missing, empty or malformed; names the file and the line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and _suffix(p) in _KNOWN)
        if not files:
            raise LorakitError(f"data: the folder {source} has no file ending in {', '.join(_KNOWN)}")
        return [record for file in files for record in _read_file(file)]
    if path.is_file():
        return _read_file(path)
    looks_local = path.suffix in (*_KNOWN, *_OPENERS) or source.startswith((".", "/", "~")) or source.count("/") != 1
    if looks_local:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = nearest(path.name, siblings, 1)
        raise LorakitError(
            f"data: there is no file {source}" + (f". Did you mean {path.parent / close[0]}?" if close else "")
        )
    return _read_hub(source)


def _suffix(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in _OPENERS]
    return suffixes[-1] if suffixes else ""


def _read_file(path: Path) -> list[Record]:
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _through_datasets("parquet", str(path), path.name)
    readers = {
        ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _text,
    }  # fmt: skip
    if suffix not in readers:
        raise LorakitError(f"data: {path} ends in {suffix or 'nothing'}; known are {', '.join(_KNOWN)}")
    opener = _OPENERS.get(path.suffix.lower(), open)
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            records = list(readers[suffix](file, path.name))
    except UnicodeDecodeError as error:
        raise LorakitError(f"data: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error):
        raise LorakitError(f"data: {path} is not a whole {path.suffix} file: damaged or cut short") from None
    except PermissionError:
        raise LorakitError(f"data: {path} cannot be read (permission denied)") from None
    if not records:
        raise LorakitError(f"data: {path} has no rows")
    return records


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise LorakitError(f"data: {where}: expected an object with named fields, found {type(value).__name__}")
    return Record(value, where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise LorakitError(f"the key {twice!r} stands twice")
    return dict(pairs)


def _parse(text: str, where: str) -> Any:
    """JSON without duplicate keys, whose first value would be lost, and without half characters."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except LorakitError as error:
        raise LorakitError(f"data: {where}: {error}") from None
    except UnicodeEncodeError:
        raise LorakitError(
            f"data: {where}: holds half of a surrogate pair (\\ud800 … \\udfff), which is no text"
        ) from None
    except RecursionError:
        raise LorakitError(f"data: {where}: nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise LorakitError(f"data: {where}: {str(error).split(';')[0]}") from None
    return value


def _jsonl(file: TextIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = _parse(line, where)
        except json.JSONDecodeError as error:
            hint = " (a whole JSON document? then name the file .json)" if number == 1 and line.strip() in "[{" else ""
            raise LorakitError(f"data: {where}: not valid JSON: {error.msg} at column {error.colno}{hint}") from None
        yield _object(value, where)


def _json(file: TextIO, name: str) -> Iterator[Record]:
    text = file.read()
    try:
        value = _parse(text, name)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(io.StringIO(text), name)
            return
        raise LorakitError(f"data: {name}, line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, (dict, list)):
        raise LorakitError(f"data: {name}: expected a list of rows, found {type(value).__name__}")
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list)]
        if len(lists) != 1:
            raise LorakitError(f"data: {name}: expected a list of rows, or an object with one list in it")
        value = lists[0]
    for number, item in enumerate(value, 1):
        yield _object(item, f"{name}, row {number}")


def _csv(file: TextIO, name: str, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader(file, delimiter=delimiter, strict=True)
    try:
        header = list(reader.fieldnames or ())
        twice = next((column for column in header if header.count(column) > 1), None)
        if twice is not None:
            raise LorakitError(f"data: {name}: the column {twice!r} stands twice in the header")
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if None in row:
                raise LorakitError(f"data: {where}: more fields than the header has ({len(reader.fieldnames or ())})")
            short = [key for key, value in row.items() if value is None]
            if short:
                raise LorakitError(f"data: {where}: no value for {', '.join(short)}")
            yield Record(dict(row), where)
    except csv.Error as error:
        raise LorakitError(f"data: {name}, line {reader.line_num}: not valid CSV: {error}") from None


def _tsv(file: TextIO, name: str) -> Iterator[Record]:
    return _csv(file, name, delimiter="\t")


def _text(file: TextIO, name: str) -> Iterator[Record]:
    text = file.read()
    if text.strip():
        yield Record({"text": text}, name)


def _read_hub(source: str) -> list[Record]:
    name, _, split = source.partition(":")
    return _through_datasets(name, None, source, split or "train")


def _through_datasets(name: str, file: str | None, label: str, split: str = "train") -> list[Record]:
    if importlib.util.find_spec("datasets") is None:
        raise LorakitError(f"data: {label} needs the package datasets: pip install 'lorakit[data]'")
    import datasets

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, data_files=file, split=split)
    except Exception as error:  # datasets raises many sorts; all of them mean that it cannot be read
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise LorakitError(f"data: {label} cannot be read: {reason}") from None
    records = [Record(dict(row), f"{label}, row {number}") for number, row in enumerate(table, 1)]
    if not records:
        raise LorakitError(f"data: {label} has no rows")
    return records
