"""An adapter folder: PEFT's two files, and `lorakit.json` for what PEFT cannot say.

Nothing here needs a model in memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.plan import Adapter
from lorakit.base.files import read_header
from lorakit.errors import LorakitError, nearest
from lorakit.store.files import friendly_io, new_folder, read_json, sync, write_json
from lorakit.store.peft_format import from_peft

CONFIG, WEIGHTS, RECORD, TEMPLATE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorakit.json",
    "chat_template.jinja",
)


#: Keys of a record that reading adds; they are not written back.
FOUND_ON_READING = ("sha256", "template_text", "peft_partial", "peft_base")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_adapter(
    folder: Path | str,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    template: str | None = None,
) -> Path:
    """Write PEFT's files and our record.

    A new folder appears whole or not at all. In a folder that has other files already (a Trainer's
    checkpoint, say) each file is replaced in one step, and the record's checksum binds them.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        with friendly_io(folder):
            _write(folder, config, tensors, record, template)
    else:
        if folder.is_dir():
            folder.rmdir()
        with new_folder(folder) as scratch:
            _write(scratch, config, tensors, record, template)
    return folder


def _write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    record: Mapping[str, Any],
    template: str | None,
) -> None:
    from safetensors.torch import save

    scratch = folder / f".{WEIGHTS}.tmp"
    scratch.write_bytes(save(dict(tensors), metadata={"format": "pt"}))
    sync(scratch)
    scratch.replace(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    if template is not None:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    else:
        (folder / TEMPLATE).unlink(missing_ok=True)  # a former adapter's
    write_json(folder / RECORD, {**record, "sha256": {WEIGHTS: _digest(folder / WEIGHTS)}})


def read_adapter(folder: Path | str) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """An adapter from its folder, ours or PEFT's, and base weights PEFT put beside it.

    Raises:
        LorakitError: missing or damaged files, a pickle, a variant that is not understood.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    if not folder.is_dir():
        siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, siblings)
        raise LorakitError(
            f"adapter: the folder {folder} does not exist" + (f". Nearest: {folder.parent / close[0]}" if close else "")
        )
    if not (folder / CONFIG).exists():
        inner = sorted(str(p.parent.relative_to(folder)) for p in folder.glob(f"*/{CONFIG}"))
        hint = f"; there is one in {os.path.join(folder, inner[0])}" if inner else ""
        raise LorakitError(f"adapter: {folder} has no {CONFIG}, so it is not an adapter folder{hint}")
    weights = folder / WEIGHTS
    if not weights.exists():
        if (folder / "adapter_model.bin").exists():
            raise LorakitError(
                f"adapter: {folder} has its tensors only as adapter_model.bin, a pickle, which can run code when it "
                "is opened. Save it again with a current PEFT (safe_serialization=True)"
            )
        raise LorakitError(f"adapter: {folder} has no {WEIGHTS}")
    config = read_json(folder / CONFIG)
    record = _checked(read_json(folder / RECORD), folder / RECORD) if (folder / RECORD).exists() else {}
    expected = record.get("sha256", {}).get(WEIGHTS)
    read_header(weights)
    if expected and _digest(weights) != expected:
        raise LorakitError(
            f"{weights} is not the file that {RECORD} was written with (checksum differs): it is damaged or was replaced"
        )
    try:
        adapter, whole = from_peft(config, load_file(weights), str(folder))
    except (TypeError, AttributeError, ValueError) as error:
        raise LorakitError(f"{folder / CONFIG} has a value of the wrong kind ({error})") from None
    except SafetensorError as error:
        raise LorakitError(f"{weights} is damaged: {error}; fetch or save it again") from None
    record = {**record, **_template(folder, record)}
    # PEFT can leave layers out in ways its list of targets does not show.
    partial = bool(config.get("exclude_modules") or config.get("layers_to_transform"))
    extra = {"peft_partial": partial, "peft_base": config.get("base_model_name_or_path")}
    return Adapter(adapter.plan, adapter.tensors, {**record, **extra}), whole


def _checked(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """Our own record, with every part that is used of the kind that is expected."""
    kinds: dict[str, type] = {"base": dict, "template": dict, "sha256": dict, "stop_token_ids": list}
    for key, kind in kinds.items():
        if key in record and not isinstance(record[key], kind):
            raise LorakitError(f"{path}: {key} should be a {kind.__name__}, found {type(record[key]).__name__}")
    if not all(isinstance(token, int) for token in record.get("stop_token_ids", ())):
        raise LorakitError(f"{path}: stop_token_ids should be whole numbers")
    return record


def _template(folder: Path, record: dict[str, Any]) -> dict[str, str]:
    """The chat template beside an adapter, if it is the one the adapter was trained with."""
    path = folder / TEMPLATE
    expected = record.get("template", {}).get("sha256")
    if not path.exists():
        if expected:
            raise LorakitError(f"{path} is missing: the adapter was trained with that template. Copy it along")
        return {}
    text = path.read_text(encoding="utf-8")
    if expected and hashlib.sha256(text.encode()).hexdigest() != expected:
        raise LorakitError(f"{path} is not the template that the adapter was trained with (checksum differs)")
    return {"template_text": text}
