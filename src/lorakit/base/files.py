"""Where a model's files are: the built-in base, a folder, or the hub's cache. Safetensors only."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from lorakit.errors import LorakitError, nearest

BUILT_IN = {"tiny": Path(__file__).parent / "models" / "tiny"}

_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.ckpt")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "tokenizer*", "*.md"]
_EDGE = 4096


def find_model(name: str, revision: str | None = None) -> Path:
    """The folder of a model: ``tiny``, a path, or a hub id (downloaded into the hub's cache).

    Raises:
        LorakitError: nothing there, an adapter instead of a model, or weights only as a pickle.
    """
    if name in BUILT_IN:
        return _checked(BUILT_IN[name], name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path, name)
    if path.is_file():
        raise LorakitError(f"model: {name} is a file; give the folder that holds config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise LorakitError(f"model: the folder {name} does not exist")
    close = nearest(name, BUILT_IN) if "/" not in name else []
    if close:
        raise LorakitError(f"model: no folder or built-in model is named {name!r}. Did you mean {close[0]!r}?")
    return _checked(_from_hub(name, revision), name)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_WANTED))
    except HFValidationError:
        raise LorakitError(
            f"model: {name!r} is neither a folder, a built-in model ({', '.join(BUILT_IN)}) nor a hub id"
        ) from None
    except RepositoryNotFoundError:
        raise LorakitError(f"model: the hub has no model {name!r} (or it is private: run `hf auth login`)") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise LorakitError(
            f"model: {name!r} is no folder here, is not in the hub's cache, and the hub could not be reached "
            f"({reason}). Built in: {', '.join(BUILT_IN)}"
        ) from None


def _checked(folder: Path, name: str) -> Path:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise LorakitError(
                f"model: {name} is an adapter, not a model; give its base as the model (to use it: lorakit chat {name})"
            )
        raise LorakitError(f"model: {name} has no config.json, so it is not a model folder")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, sorted; refuses pickles.

    Raises:
        LorakitError: no weights, or weights only as a pickle.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise LorakitError(
                f"model: {folder} has its weights only as {pickles[0]}, a pickle, which can run code when it is "
                "opened. Convert it to safetensors first (transformers' save_pretrained writes that)"
            )
        raise LorakitError(f"model: {folder} has no *.safetensors weights")
    return files


def read_header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensor table of a safetensors file and the offset of its data.

    Raises:
        LorakitError: the file is cut short or is no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise LorakitError(f"{path} is not a safetensors file, or it is damaged; fetch or save it again")
        try:
            table = json.loads(file.read(length))
        except ValueError:
            raise LorakitError(f"{path} has a damaged header; fetch or save it again") from None
    try:
        table.pop("__metadata__", None)
        end = max((int(entry["data_offsets"][1]) for entry in table.values()), default=0)
        for entry in table.values():
            _, _ = entry["dtype"], list(entry["shape"])
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise LorakitError(f"{path} has a damaged header; fetch or save it again") from None
    if 8 + length + end != size:
        raise LorakitError(
            f"{path} should be {8 + length + end} bytes and is {size}: it is cut short; fetch or save it again"
        )
    return table, 8 + length


def _edges(path: Path) -> Iterator[tuple[str, str, list[int], bytes]]:
    table, offset = read_header(path)
    with path.open("rb") as file:
        for name, entry in table.items():
            start, stop = (offset + o for o in entry["data_offsets"])
            file.seek(start)
            first = file.read(min(_EDGE, stop - start))
            file.seek(max(start, stop - _EDGE))
            yield name, entry["dtype"], entry["shape"], first + file.read(min(_EDGE, stop - start))


def fingerprint(folder: Path) -> str:
    """SHA-256 over the sorted (name, dtype, shape, first and last 4 KiB) of a model's tensors.

    Read from the files, so it is the same for every precision the base is loaded in, and fast
    for a base of any size.
    """
    digest = hashlib.sha256()
    entries = sorted(entry for path in weight_files(folder) for entry in _edges(path))
    for name, dtype, shape, edge in entries:
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        digest.update(edge)
    return digest.hexdigest()
