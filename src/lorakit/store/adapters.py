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
    write_json(folder / RECORD, {**record, "sha256": {WEIGHTS: _digest(folder / WEIGHTS)}})


def read_adapter(folder: Path | str) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """An adapter from its folder, ours or PEFT's, and base weights PEFT put beside it.

    Raises:
        LorakitError: missing or damaged files, a pickle, a variant that is not understood.
    """
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
    record = read_json(folder / RECORD) if (folder / RECORD).exists() else {}
    expected = record.get("sha256", {}).get(WEIGHTS)
    read_header(weights)
    if expected and _digest(weights) != expected:
        raise LorakitError(
            f"{weights} is not the file that {RECORD} was written with (checksum differs): it is damaged or was replaced"
        )
    adapter, whole = from_peft(config, load_file(weights), str(folder))
    if (folder / TEMPLATE).exists():
        record = {**record, "template_text": (folder / TEMPLATE).read_text(encoding="utf-8")}
    # PEFT can leave layers out in ways its list of targets does not show.
    partial = bool(config.get("exclude_modules") or config.get("layers_to_transform"))
    extra = {"peft_partial": partial, "peft_base": config.get("base_model_name_or_path")}
    return Adapter(adapter.plan, adapter.tensors, {**record, **extra}), whole
