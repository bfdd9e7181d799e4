"""What a user points at: a run's folder, an adapter's, or a model. Shared by eval, generate and chat."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from lorakit.data.template import Template


@dataclass(frozen=True)
class Opened:
    """A model ready to answer, with the template it was trained with and the tokens it ends on."""

    model: Any
    template: Template
    stop: list[int]
    label: str


def open_target(
    name: str, base: str | None = None, device: str = "auto", precision: str = "auto", any_base: bool = False
) -> Opened:
    """Load a run, an adapter (ours or PEFT's) or a plain model.

    Args:
        base: which base to put the adapter on; the one it was trained on by default.
    """
    from lorakit.base.load import load_base
    from lorakit.data.dataset import stop_tokens
    from lorakit.data.template import Template
    from lorakit.store.adapters import CONFIG, read_adapter
    from lorakit.store.attached import load_adapter

    path = Path(name).expanduser()
    if (path / "recipe.yaml").exists():  # a run
        if not (path / "summary.json").exists():
            raise LorakitError(f"{name} is a run that is not finished; continue it with: lorakit resume {name}")
        path = path / "adapter" if (path / "adapter").exists() else path / "model"
    if not (path / CONFIG).exists():
        model = load_base(str(path) if path.exists() else name, device=device, precision=precision)
        return Opened(model, Template(model.tokenizer), stop_tokens(model), name)

    adapter, _ = read_adapter(path)
    record: Any = adapter.record
    base = base or (record.get("base") or {}).get("name") or record.get("peft_base")
    if not base:
        raise LorakitError(f"adapter: {path} does not say which base it is for; give --model")
    revision = (record.get("base") or {}).get("revision")
    model = load_base(base, device=device, precision=precision, revision=revision)
    load_adapter(model, path, any_base=any_base)
    text = record.get("template_text")
    trained_plain = "template" in record and record["template"].get("sha256") is None
    template = Template(model.tokenizer, "none" if trained_plain else "auto", text)
    stop = [*stop_tokens(model), *(t for t in record.get("stop_token_ids", ()) if t not in stop_tokens(model))]
    return Opened(model, template, stop, f"{base} + {path}")
