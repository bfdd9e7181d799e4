"""lorakit: fine-tune any Hugging Face model with low-rank adapters, on the machine you have.

Names are looked up when they are first used, so that `import lorakit` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorakit.adapters.methods import DoRA as DoRA
    from lorakit.adapters.methods import Full as Full
    from lorakit.adapters.methods import LoRA as LoRA
    from lorakit.adapters.route import Route as Route
    from lorakit.base.load import load_base as load_base
    from lorakit.errors import LorakitError as LorakitError
    from lorakit.store.adapters import read_adapter as read_adapter
    from lorakit.store.attached import attach as attach
    from lorakit.store.attached import load_adapter as load_adapter
    from lorakit.training.api import train as train

_WHERE = {
    "DoRA": "adapters.methods",
    "Full": "adapters.methods",
    "LoRA": "adapters.methods",
    "LorakitError": "errors",
    "Route": "adapters.route",
    "attach": "store.attached",
    "load_adapter": "store.attached",
    "load_base": "base.load",
    "read_adapter": "store.adapters",
    "train": "training.api",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"lorakit.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'lorakit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
