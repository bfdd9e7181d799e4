"""From what the user names to the modules it means, or an error that names the nearest.

Resolved and checked before the model is touched: a name that matches nothing is never ignored,
even beside names that match.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lorakit.adapters.kinds import KINDS, kind_of
from lorakit.errors import LorakitError, nearest

ALL_LINEAR = "all-linear"
Targets = str | Sequence[str]
T = TypeVar("T")

_PLAIN = re.compile(r"[\w.\-]+")


def output_head(model: nn.Module) -> nn.Module | None:
    """The unembedding, for models that say which module it is (transformers' public getter)."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        return None


def _matches(pattern: str, paths: Iterable[str]) -> list[str]:
    """Paths that equal a plain name, end in ``.name``, or match a regular expression in full."""
    if _PLAIN.fullmatch(pattern):
        suffixed = [path for path in paths if path == pattern or path.endswith("." + pattern)]
        if suffixed or "." not in pattern.replace("\\.", ""):
            return suffixed
    try:
        regex = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise LorakitError(f"targets: {pattern!r} is not a valid regular expression: {error}") from None
    return [path for path in paths if regex.fullmatch(path)]


def _nothing(pattern: str, modules: dict[str, nn.Module]) -> LorakitError:
    leaves = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path, m in modules.items() if kind_of(m)))
    known = nearest(pattern.rsplit(".", 1)[-1], leaves) or leaves[:8]
    return LorakitError(
        f"targets: {pattern!r} matches no module of this model. "
        f"Nearest: {', '.join(known)}; 'all-linear' takes every linear layer"
    )


def _unsupported(pattern: str, path: str, modules: dict[str, nn.Module]) -> LorakitError:
    module = modules[path]
    inner = [name for name, child in module.named_modules() if name and kind_of(child)]
    message = (
        f"targets: {pattern!r} matches {path}, a {type(module).__name__}, "
        f"which cannot carry an adapter (kinds: {', '.join(KINDS)})"
    )
    return LorakitError(message + (f". Inside it: {', '.join(inner[:8])}" if inner else ""))


def resolve_targets(model: nn.Module, targets: Targets, exclude: Sequence[str] = ()) -> list[str]:
    """The paths of the modules that get an adapter, in the model's order.

    Args:
        model: any module; nothing in it is changed.
        targets: ``"all-linear"`` (every linear layer but the unembedding), or names: an exact path,
            the end of a path (``"q_proj"``), or a regular expression for a whole path (a string
            that has other characters than a name, or that begins with ``re:``).
        exclude: the same sorts of names, taken out again.

    Raises:
        LorakitError: a name that matches nothing, a match no adapter can sit on, nothing left.
    """
    modules = {path: module for path, module in model.named_modules() if path}
    names = [targets] if isinstance(targets, str) else list(targets)
    if not names:
        raise LorakitError("targets: the list is empty; 'all-linear' takes every linear layer")

    chosen: set[str] = set()
    for name in names:
        if name == ALL_LINEAR:
            head = output_head(model)
            attention = next((path for path, m in modules.items() if isinstance(m, nn.MultiheadAttention)), None)
            if attention:
                warnings.warn(
                    f"all-linear leaves out {attention} and any other nn.MultiheadAttention: its projections are not "
                    "supported yet",
                    stacklevel=2,
                )
            chosen |= {
                path
                for path, module in modules.items()
                if module is not head and (kind := kind_of(module)) and kind.name != "embedding"
            }
            continue
        found = _matches(name, modules)
        if not found:
            raise _nothing(name, modules)
        # A regular expression may touch containers on the way; a plain name must mean layers.
        layers = [path for path in found if kind_of(modules[path])]
        if not layers or (_PLAIN.fullmatch(name) and len(layers) < len(found)):
            raise _unsupported(name, next(p for p in found if p not in layers), modules)
        chosen |= set(layers)

    for name in exclude:
        found = _matches(name, modules)
        if not found:
            raise _nothing(name, modules)
        inside = tuple(path + "." for path in found)
        chosen -= {path for path in chosen if path in found or path.startswith(inside)}
    if not chosen:
        raise LorakitError(f"targets: nothing is left of {names} after excluding {list(exclude)}")
    return [path for path in modules if path in chosen]


def pattern_value(patterns: Mapping[str, T], path: str) -> T | None:
    """The value of the first key, in dictionary order, that matches the path's end.

    PEFT's own rule: ``re.match(rf"(.*\\.)?({key})$", path)``.
    """
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return None


def check_patterns(field: str, patterns: Mapping[str, object], paths: Sequence[str]) -> None:
    """Every key of rank_pattern or alpha_pattern must match a target."""
    for key in patterns:
        try:
            used = any(re.match(rf"(.*\.)?({key})$", path) for path in paths)
        except re.error as error:
            raise LorakitError(f"{field}: {key!r} is not a valid regular expression: {error}") from None
        if not used:
            leaves = list(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))
            close = nearest(key, leaves) or leaves[:8]
            raise LorakitError(f"{field}: {key!r} matches none of the targets. Nearest: {', '.join(close)}")
