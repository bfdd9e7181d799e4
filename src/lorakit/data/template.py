"""From an example to tokens and a loss mask, the same way in training and in generation.

A template travels with its adapter. What a model is asked at generation is, token for token, what
stood before the trained tokens in training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit.base.batch import TokenRow
from lorakit.data.formats import Example, Message
from lorakit.errors import LorakitError

LOSSES = ("auto", "completion", "last", "all")

#: For chat data on a model without a template: plain words, so that no token has to be added.
PLAIN_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}Assistant: {{ m['content'] }}{{ eos_token }}\n"
    "{% else %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class _Piece:
    text: str
    trained: bool


class Template:
    """A tokenizer and the way examples are written for it.

    Args:
        tokenizer: of transformers.
        choice: ``auto`` (the tokenizer's chat template if it has one, else none), ``none`` (prompt and
            completion as they are), or the path of a Jinja file.
        text: a chat template given directly, e.g. the one found beside an adapter.
    """

    def __init__(self, tokenizer: Any, choice: str = "auto", text: str | None = None):
        self.tokenizer = tokenizer
        self.notes: list[str] = []
        own = getattr(tokenizer, "chat_template", None)
        if isinstance(own, dict):
            own = own.get("default")
        self.chat: str | None
        if text is not None:
            self.chat, self.origin = text, "the adapter's"
        elif choice == "auto":
            self.chat, self.origin = own, "the tokenizer's" if own else "none"
        elif choice == "none":
            self.chat, self.origin = None, "none"
        else:
            path = Path(choice).expanduser()
            if not path.is_file():
                raise LorakitError(f"template: {choice!r} is neither 'auto', 'none' nor a file")
            try:
                self.chat, self.origin = path.read_text(encoding="utf-8"), str(path)
            except UnicodeDecodeError:
                raise LorakitError(f"template: {path} is not a UTF-8 text file") from None

    def adopt(self, examples: Sequence[Example]) -> None:
        """Conversations need a template: without one they are written in plain words, here and in generation."""
        if self.chat is None and any(example.messages is not None for example in examples):
            self.chat, self.origin = PLAIN_CHAT, "plain words (User: … Assistant: …)"

    @property
    def sha256(self) -> str | None:
        return hashlib.sha256(self.chat.encode()).hexdigest() if self.chat else None

    # -------------------------------------------------------------- writing text

    def _render(self, messages: Sequence[Message], where: str, generation: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.chat, tokenize=False, add_generation_prompt=generation
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise LorakitError(
                f"data: {where}: the chat template refuses this conversation: {str(error)[:160]}"
            ) from None

    def _chat_pieces(self, messages: Sequence[Message], loss: str, where: str) -> list[_Piece]:
        """The conversation's text, cut where training starts and stops.

        A turn's trained text runs from the end of the generation prompt to the end-of-turn token;
        white space that the template puts after it is not trained.
        """
        full = self._render(messages, where)
        if loss == "all":
            return [_Piece(full.rstrip(), True)]
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        pieces, end = [], 0
        for i in turns[-1:] if loss == "last" else turns:
            before = self._render(messages[:i], where, generation=True) if i else ""
            through = self._render(messages[: i + 1], where)
            if messages[i].get("tool_calls"):
                without = {k: v for k, v in messages[i].items() if k != "tool_calls"}
                if self._render([*messages[:i], without], where) == through:
                    raise LorakitError(
                        f"data: {where}, message {i + 1}: the chat template leaves its tool_calls out, so the answer "
                        "would be learnt without them; give a template that writes them"
                    )
            if not (full.startswith(before) and full.startswith(through) and len(through) > len(before) >= end):
                raise LorakitError(
                    f"data: {where}: the chat template rewrites message {i + 1} when more follow, so its trained part "
                    "cannot be told exactly; use loss: last, split the conversation, or give a template that does not"
                )
            stop = len(through.rstrip())
            pieces += [_Piece(full[end : len(before)], False), _Piece(full[len(before) : stop], True)]
            end = stop
        # What comes after the last trained token teaches nothing and is left out.
        return [piece for piece in pieces if piece.text]

    # ------------------------------------------------------------------- tokens

    def encode(self, example: Example, loss: str = "auto") -> TokenRow:
        """The tokens of one example; raises if none of them is trained."""
        if example.text is not None:
            ids = self._ids(example.text, special=True)
            if self.tokenizer.eos_token_id is not None and (not ids or ids[-1] != self.tokenizer.eos_token_id):
                ids.append(self.tokenizer.eos_token_id)
            mask = [True] * len(ids)
            bos = self.tokenizer.bos_token_id
            if bos is not None and ids[0] != bos:
                ids, mask = [bos, *ids], [False, *mask]
        elif example.messages is None and self.chat is None:
            ids, mask = self._plain(example, loss)
        else:
            pieces = self._chat_pieces(as_messages(example), loss, example.where)
            ids, mask = self._aligned(pieces) if pieces else ([], [])
        if not any(mask[1:]):
            raise LorakitError(f"data: {example.where}: no token of this row would be trained (loss: {loss})")
        return TokenRow(torch.tensor(ids), torch.tensor(mask))

    def _plain(self, example: Example, loss: str) -> tuple[list[int], list[bool]]:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise LorakitError("template: the tokenizer has no end-of-text token, so a completion could never end")
        prompt = self.encode_prompt(example.prompt or "")
        completion = [*self._ids(example.completion or ""), eos]
        return prompt + completion, [loss == "all"] * len(prompt) + [True] * len(completion)

    def encode_prompt(self, prompt: str | Sequence[Message], where: str = "prompt") -> list[int]:
        """The tokens a model is asked with: everything up to where its answer begins."""
        if isinstance(prompt, str) and self.chat is None:
            return self._ids(prompt, special=True)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._ids(self._render(messages, where, generation=True))

    def _ids(self, text: str, special: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        if special and ids and ids[-1] == self.tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers close every text; the end is put where it belongs by us
        return list(ids)

    def _aligned(self, pieces: Sequence[_Piece]) -> tuple[list[int], list[bool]]:
        """Tokens of the joined text if every cut falls between two of them; else piece by piece.

        Piece by piece is what generation sees: the prompt is tokenised before its answer exists.
        """
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(
                "".join(piece.text for piece in pieces),
                add_special_tokens=False,
                return_offsets_mapping=True,
                verbose=False,
            )
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            starts = {start for start, _ in offsets} | {offsets[-1][1]}
            edges, at = [], 0
            for piece in pieces:
                edges.append((at, at + len(piece.text), piece.trained))
                at += len(piece.text)
            if all(start in starts for start, _, _ in edges) and not any(
                s < e0 < e for s, e in offsets for e0, _, _ in edges
            ):
                trained = [(start, stop) for start, stop, is_trained in edges if is_trained]
                mask = [any(a <= start and end <= b for a, b in trained) for start, end in offsets]
                return list(ids), mask
        ids, mask = [], []
        for piece in pieces:
            own = self._ids(piece.text)
            ids += own
            mask += [piece.trained] * len(own)
        return ids, mask


def as_messages(example: Example) -> tuple[Message, ...]:
    """A prompt and its completion as a conversation of two turns."""
    if example.messages is not None:
        return example.messages
    return ({"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion})
