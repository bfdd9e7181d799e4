"""The one error a user sees, and the habit of naming the nearest right spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LorakitError(Exception):
    """A mistake the user can mend: one clear line, no traceback, exit code 2.

    The message names the file, row or key, and says what to do.
    """


def nearest(word: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options that look most like `word`, best first (by spelling, then by shared ending)."""
    options = list(dict.fromkeys(options))
    lower = {option.lower(): option for option in options}
    close = [lower[m] for m in difflib.get_close_matches(word.lower(), lower, n=count, cutoff=0.6)]
    contained = [o for o in options if word.lower() in o.lower() or o.lower() in word.lower()]
    return list(dict.fromkeys(close + contained))[:count]


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A sentence such as ``Did you mean 'rank'?``, or an empty string when nothing is near."""
    close = nearest(word, options)
    if not close:
        return ""
    return f"Did you mean {' or '.join(repr(c) for c in close)}?"
