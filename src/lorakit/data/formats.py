"""Recognising what a file of examples holds, and bringing every row into one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.data.read import Record
from lorakit.errors import LorakitError, did_you_mean, nearest

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """One training example: a conversation, a prompt with its completion, or plain text.

    Exactly one of `messages`, `prompt` (with `completion`) and `text` is set.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Format:
    """A recognised format: its name and which column plays which part."""

    name: str
    columns: Mapping[str, str]

    def describe(self) -> str:
        parts = ", ".join(f"{part} ← {column}" for part, column in self.columns.items())
        return f"{self.name} ({parts})"


_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "function": "tool",
    "observation": "tool",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool")

# Format → the parts it needs, each with the column names it is known under, the usual one first.
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "chat": {"messages": ("messages",)},
    "sharegpt": {"conversations": ("conversations", "conversation")},
    "alpaca": {"instruction": ("instruction",), "output": ("output", "response")},
    "prompt-completion": {
        "prompt": ("prompt", "question", "query", "input", "source"),
        "completion": ("completion", "answer", "response", "output", "target"),
    },
    "classification": {"text": ("text", "sentence"), "label": ("label", "intent", "category")},
    "text": {"text": ("text", "content")},
}
_OPTIONAL = {"alpaca": ("input", "system"), "prompt-completion": ("system",)}
FORMATS = tuple(_PARTS)


def recognise(records: Sequence[Record], format_name: str = "auto", columns: Mapping[str, str] | None = None) -> Format:
    """Which format the rows have, from the columns of the first one.

    Args:
        records: rows as read.
        format_name: one of `FORMATS`, or ``auto``.
        columns: part → column, for files with other names (``{"prompt": "mr", "completion": "ref"}``).

    Raises:
        LorakitError: no format fits; lists the columns and how to map them.
    """
    present = list(records[0].fields)
    anywhere = {column for record in records for column in record.fields}
    columns = dict(columns or {})
    known_parts = {part for parts in _PARTS.values() for part in parts} | {"input", "system"}
    for part, column in columns.items():
        if part not in known_parts:
            raise LorakitError(f"columns: {part!r} is no part of an example. {did_you_mean(part, known_parts)}")
        if column not in anywhere:
            raise LorakitError(
                f"columns: {part} is to come from {column!r}, but {records[0].where} has {', '.join(present)}. "
                + did_you_mean(column, present)
            )
    if format_name != "auto" and format_name not in _PARTS:
        raise LorakitError(
            f"format: {format_name!r} is none of auto, {', '.join(FORMATS)}. {did_you_mean(format_name, FORMATS)}"
        )
    for name in FORMATS if format_name == "auto" else (format_name,):
        chosen = _match(name, present, anywhere, columns)
        if chosen is not None and set(columns) <= set(chosen):
            return Format(name, chosen)
    wanted = "; ".join(f"{name}: {' + '.join(parts)}" for name, parts in _PARTS.items())
    close = [f"{c} → {n[0]}" for c in present if (n := nearest(c, known_parts, 1)) and n[0] != c]
    raise LorakitError(
        f"data: the columns of {records[0].where} ({', '.join(present)}) fit "
        + ("no known format" if format_name == "auto" else f"not the format {format_name!r}")
        + f". Known: {wanted}. Map them with columns, e.g. --columns prompt={(present or ['A'])[0]},"
        + f"completion={(present or ['B'])[-1]}"
        + (f" (nearest: {', '.join(close)})" if close else "")
    )


def _match(name: str, present: Sequence[str], anywhere: set[str], columns: Mapping[str, str]) -> dict[str, str] | None:
    chosen: dict[str, str] = {}
    for part, aliases in _PARTS[name].items():
        column = columns.get(part) or next((a for a in aliases if a in present and a not in columns.values()), None)
        if column is None:
            return None
        chosen[part] = column
    for part in _OPTIONAL.get(name, ()):
        column = columns.get(part, part)
        if column in anywhere and column not in chosen.values():
            chosen[part] = column
    return chosen


def to_example(record: Record, form: Format) -> Example:
    """One row in the common form.

    Raises:
        LorakitError: a missing, empty or wrongly typed field; names the row and the nearest column.
    """
    get = {part: _field(record, column, part, form) for part, column in form.columns.items()}
    return _BUILDERS[form.name](record.where, get)


def _field(record: Record, column: str, part: str, form: Format) -> Any:
    optional = part in _OPTIONAL.get(form.name, ())
    if column not in record.fields:
        if optional:
            return None
        raise LorakitError(
            f"data: {record.where}: no {column!r} (it has {', '.join(record.fields)}). "
            + did_you_mean(column, record.fields)
        )
    value = record.fields[column]
    if value is None and not optional:
        raise LorakitError(f"data: {record.where}: {column!r} is null")
    return value


def _string(where: str, part: str, value: Any, may_be_empty: bool = False) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise LorakitError(f"data: {where}: {part} should be text, found {type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise LorakitError(f"data: {where}: {part} is empty, so there is nothing to learn from this row")
    return value


def _with_system(where: str, get: dict[str, Any], prompt: str, completion: str) -> Example:
    system = get.get("system")
    if not system:
        return Example(where, prompt=prompt, completion=completion)
    turns = (("system", _string(where, "system", system)), ("user", prompt), ("assistant", completion))
    return Example(where, messages=tuple({"role": role, "content": content} for role, content in turns))


def _alpaca(where: str, get: dict[str, Any]) -> Example:
    prompt = _string(where, "instruction", get["instruction"])
    if get.get("input"):
        prompt = f"{prompt}\n\n{_string(where, 'input', get['input'])}"
    return _with_system(where, get, prompt, _string(where, "output", get["output"]))


def _prompt(where: str, get: dict[str, Any]) -> Example:
    if isinstance(get["prompt"], list) and isinstance(get["completion"], list):
        return Example(where, messages=_messages(where, [*get["prompt"], *get["completion"]], "role", "content"))
    return _with_system(
        where, get, _string(where, "prompt", get["prompt"]), _string(where, "completion", get["completion"])
    )


def _classification(where: str, get: dict[str, Any]) -> Example:
    label = str(get["label"]) if isinstance(get["label"], bool) else get["label"]
    return Example(where, prompt=_string(where, "text", get["text"]), completion=_string(where, "label", label))


def _messages(where: str, turns: Any, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        raise LorakitError(f"data: {where}: expected a non-empty list of messages")
    messages = []
    for number, turn in enumerate(turns, 1):
        spot = f"{where}, message {number}"
        if not isinstance(turn, dict):
            raise LorakitError(f"data: {spot}: expected an object with {role_key!r} and {content_key!r}")
        for key in (role_key, content_key):
            if key not in turn and not (key == content_key and turn.get("tool_calls")):
                raise LorakitError(f"data: {spot}: no {key!r} (it has {', '.join(turn)}). {did_you_mean(key, turn)}")
        role = str(turn[role_key])
        role = role if role in _ROLES else _SPEAKERS.get(role.lower(), role)
        if role not in _ROLES:
            raise LorakitError(
                f"data: {spot}: {role_key} {role!r} is none of {', '.join(_ROLES)}. {did_you_mean(role, _ROLES)}"
            )
        content = turn.get(content_key)
        if isinstance(content, list):
            content = "".join(_part(spot, part) for part in content)
        if not turn.get("tool_calls"):
            content = _string(spot, "content", content, may_be_empty=role != "assistant")
        rest = {k: v for k, v in turn.items() if k not in (role_key, content_key)}
        messages.append({"role": role, "content": content or "", **rest})
    if not any(message["role"] == "assistant" for message in messages):
        raise LorakitError(f"data: {where}: no assistant message, so there is nothing to learn from this row")
    return tuple(messages)


def _part(spot: str, part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise LorakitError(f"data: {spot}: content has a part that is not text; images and sound are not supported")


_BUILDERS: dict[str, Callable[[str, dict[str, Any]], Example]] = {
    "chat": lambda where, get: Example(where, messages=_messages(where, get["messages"], "role", "content")),
    "sharegpt": lambda where, get: Example(where, messages=_messages(where, get["conversations"], "from", "value")),
    "alpaca": _alpaca,
    "prompt-completion": _prompt,
    "classification": _classification,
    "text": lambda where, get: Example(where, text=_string(where, "text", get["text"])),
}
