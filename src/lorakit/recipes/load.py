"""Recipes from a YAML file, `key=value` overrides and flags, the later over the earlier."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import LorakitError
from lorakit.recipes.schema import Recipe, apply_aliases, build_recipe


class _OnceLoader(yaml.SafeLoader):
    """YAML without duplicate keys, of which the first would be lost in silence."""


def _mapping(loader: _OnceLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_OnceLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a recipe file.

    Raises:
        LorakitError: missing, or not valid YAML (names the line).
    """
    if not path.is_file():
        raise LorakitError(f"recipe: there is no file {path}")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise LorakitError(f"recipe: {path}{line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, TypeError, RecursionError):
        raise LorakitError(f"recipe: {path} is not a YAML file of 'key: value' lines") from None
    if value is None:
        raise LorakitError(f"recipe: {path} is empty")
    if not isinstance(value, dict):
        raise LorakitError(f"recipe: {path} should hold 'key: value' lines, found {type(value).__name__}")
    return {str(key): item for key, item in value.items()}


def parse_value(text: str) -> Any:
    """A value typed on the command line: YAML's rules, and 3e-4 is a number."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an impossible date
        return text
    if isinstance(value, (datetime.date, datetime.datetime)):
        return text
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return text
    return value


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["lr=3e-4", "rank=8"]`` → ``{"lr": 3e-4, "rank": 8}``."""
    settings: dict[str, Any] = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise LorakitError(f"recipe: {word!r} is neither a recipe file nor key=value")
        settings[key.lstrip("-")] = parse_value(value)
    return settings


def load_recipe(path: str | Path | None, overrides: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """A checked recipe, and the lines that tell which spellings were changed.

    Paths in a file are taken from where the command runs, as typed ones are.
    """
    base, said = apply_aliases(read_yaml(Path(path))) if path else ({}, [])
    over, more = apply_aliases(dict(overrides))
    return build_recipe({**base, **over}, f"recipe {path}" if path else "recipe"), said + more


def dump_recipe(recipe: Recipe) -> str:
    """YAML of a recipe, every key written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
