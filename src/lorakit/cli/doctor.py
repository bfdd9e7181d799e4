"""`lorakit doctor`: what is here, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil

_EXTRAS = {
    "datasets": ("Parquet files and hub data", "pip install 'lorakit[data]'"),
    "tensorboard": ("report_to: tensorboard", "pip install 'lorakit[tensorboard]'"),
    "wandb": ("report_to: wandb", "pip install 'lorakit[wandb]'"),
}


def doctor() -> None:
    """Versions, devices, and what is missing."""
    import torch

    from lorakit import __version__
    from lorakit.base.devices import choose_device, cpu_flags
    from lorakit.base.files import BUILT_IN, fingerprint
    from lorakit.base.precision import choose_precision
    from lorakit.cli.show import facts, heading, next_step, size

    heading("Versions")
    packages = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "pydantic", "typer", "rich")
    facts(
        [
            ("lorakit", __version__),
            ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
            *((name, importlib.metadata.version(name)) for name in packages),
        ]
    )
    heading("Machine")
    chosen = choose_device()
    precision = choose_precision("auto", chosen.value)
    flags = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if f in cpu_flags()]
    rows = [
        (
            "processor",
            f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; {', '.join(flags) or 'flags unknown'}",
        ),
        ("disk here", f"{size(shutil.disk_usage('.').free)} free"),
    ]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        rows.insert(1, ("memory", size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))))
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        rows.append(
            (
                f"cuda:{i}",
                f"{properties.name}, {size(properties.total_memory)}, compute {properties.major}.{properties.minor}",
            )
        )
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device or driver was found"
        rows.append(("cuda", f"not available: {why}"))
    rows.append(("mps", "available" if torch.backends.mps.is_available() else "not available"))
    rows.append(
        ("auto means", f"device {chosen.value} ({chosen.reason}), precision {precision.value} ({precision.reason})")
    )
    facts(rows)
    heading("Extras")
    facts(
        [
            (
                name,
                f"{use}: "
                + (importlib.metadata.version(name) if importlib.util.find_spec(name) else f"missing; {how}"),
            )
            for name, (use, how) in _EXTRAS.items()
        ]
    )
    heading("Built-in base")
    facts([(name, f"{folder} (fingerprint {fingerprint(folder)[:16]})") for name, folder in BUILT_IN.items()])
    next_step("lorakit data check FILE", "lorakit train --model tiny --data FILE")
