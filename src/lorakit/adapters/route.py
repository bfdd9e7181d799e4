"""Which adapter acts on which tokens: the route of a batch.

One mechanism serves training many adapters on one base, mixed batches and comparing the base with
an adapter side by side. A route lies over the *flattened* tokens of a batch; tokens in no segment
see the base alone; several weights in one segment are an exact mix, Σ wᵢ·ΔWᵢ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType

from lorakit.errors import LorakitError

Mix = Mapping[str, float]
Segment = tuple[int, int, Mix]


def as_mix(choice: str | Mix | None) -> dict[str, float]:
    """``"a"`` → ``{"a": 1.0}``; None → ``{}``, the base alone."""
    if choice is None:
        return {}
    if isinstance(choice, str):
        return {choice: 1.0}
    return {name: float(weight) for name, weight in choice.items() if weight != 0}


class Route:
    """Segments ``(start, stop, {name: weight})`` over a batch's flattened tokens.

    Args:
        segments: not overlapping; sorted on the way in; gaps are the base alone.
        tokens: how many tokens the batch has in all. When given, a module that sees another
            number raises instead of guessing.

    Raises:
        LorakitError: overlapping, empty or negative segments.
    """

    def __init__(self, segments: Sequence[tuple[int, int, str | Mix | None]], tokens: int | None = None):
        ordered = sorted(((s, e, as_mix(m)) for s, e, m in segments), key=lambda seg: seg[:2])
        end = 0
        for start, stop, _ in ordered:
            if start < end or stop <= start:
                raise LorakitError(
                    f"route: segment ({start}, {stop}) is empty, negative or overlaps the one before, "
                    f"which ends at {end}"
                )
            end = stop
        if tokens is not None and end > tokens:
            raise LorakitError(f"route: the last segment ends at {end}, the batch has {tokens} tokens")
        self.segments: tuple[Segment, ...] = tuple(ordered)
        self.tokens = tokens
        self.whole: dict[str, float] | None = None
        self._rows: Route | None = None

    @classmethod
    def everywhere(cls, choice: str | Mix) -> Route:
        """One adapter, or one mix, on every token of any batch: the fast case."""
        route = cls([])
        route.whole = as_mix(choice)
        return route

    @classmethod
    def rows(cls, choices: Sequence[str | Mix | None], length: int) -> Route:
        """One choice per row of a padded batch (rows, length).

        Modules that see one vector a row (poolers, classification heads) follow the same choices.
        """
        route = cls(
            [(i * length, (i + 1) * length, c) for i, c in enumerate(choices) if as_mix(c)],
            tokens=len(choices) * length,
        )
        route._rows = cls([(i, i + 1, c) for i, c in enumerate(choices) if as_mix(c)], tokens=len(choices))
        return route

    @property
    def names(self) -> set[str]:
        """Every adapter the route asks for."""
        mixes = [self.whole or {}] + [mix for _, _, mix in self.segments]
        return {name for mix in mixes for name in mix}

    def segments_for(self, tokens: int) -> tuple[Segment, ...]:
        """The segments as they lie over an input of `tokens` flattened positions."""
        if self.tokens is None or self.tokens == tokens:
            if self.segments and self.segments[-1][1] > tokens:
                raise LorakitError(f"route: a segment ends at {self.segments[-1][1]}, but a module saw {tokens} tokens")
            return self.segments
        if self._rows is not None and self._rows.tokens == tokens:
            return self._rows.segments
        raise LorakitError(
            f"route: made for {self.tokens} tokens, but a module saw {tokens}. Make the route for the "
            "flattened batch that is passed to the model, and switch it for every generation step"
        )

    def __repr__(self) -> str:
        return f"Route({self.whole if self.whole is not None else list(self.segments)})"


# Which route is in force, by switch. A mapping is replaced, never changed: contexts stay apart.
_IN_FORCE: ContextVar[Mapping[Switch, Route | None]] = ContextVar("lorakit_routes", default=MappingProxyType({}))


class Switch:
    """One attached model's choice of route: a default, and what a `with` block puts above it."""

    def __init__(self) -> None:
        self.default: Route | None = None

    def current(self) -> Route | None:
        """The route in force here; None is the base alone."""
        return _IN_FORCE.get().get(self, self.default)

    @contextlib.contextmanager
    def using(self, route: Route | None) -> Iterator[None]:
        token = _IN_FORCE.set({**_IN_FORCE.get(), self: route})
        try:
            yield
        finally:
            _IN_FORCE.reset(token)

    def checkpoint_contexts(
        self,
    ) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """`context_fn` of `torch.utils.checkpoint`: the recomputation sees the forward's route.

        The backward pass may run outside the `using` block (and in another thread), where the
        ContextVar says something else; without this the recomputed activations would be wrong.
        """
        return contextlib.nullcontext(), self.using(self.current())
