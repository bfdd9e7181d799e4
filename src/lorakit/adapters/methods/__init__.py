"""The table of methods: one file and one line here for each."""

from __future__ import annotations

from lorakit.adapters.methods.base import Method, ModuleState
from lorakit.adapters.methods.dora import DoRA
from lorakit.adapters.methods.full import Full
from lorakit.adapters.methods.lora import LoRA

METHODS: dict[str, type[Method]] = {method.name: method for method in (LoRA, DoRA, Full)}

__all__ = ["METHODS", "DoRA", "Full", "LoRA", "Method", "ModuleState"]
