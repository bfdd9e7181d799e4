"""The one training loop.

Every method, device and length of run goes through here. The batch plan is a pure function, the
schedule too; so the state is the trained tensors, the optimiser, the random state and `Progress`.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn

from lorakit.base.batch import TokenRow
from lorakit.base.devices import fast_bf16, peak_memory_bytes
from lorakit.base.forward import Scorer
from lorakit.data.batches import BatchPlan, micro_batches
from lorakit.errors import LorakitError
from lorakit.recipes.schema import Recipe
from lorakit.training.checkpoint import Checkpoints, Progress, random_state, restore_random_state
from lorakit.training.events import EventLog
from lorakit.training.optim import build_optimizers, lr_factor


class Watcher(Protocol):
    """Who looks on. The loop tells; it does not print."""

    def begin(self, total: int, progress: Progress) -> None: ...

    def step(self, total: int, progress: Progress, loss: float, tokens_per_second: float) -> None: ...

    def evaluated(self, step: int, loss: float, is_best: bool) -> None: ...

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the state has been saved."""

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step}; the state is saved")
        self.step = step


class Loop:
    """A run of `recipe.steps` optimiser steps.

    Args:
        model: its trainable parameters are those with `requires_grad`.
        rows: training rows.
        held_out: rows for the evaluation loss; may be empty.
        recipe: resolved: nothing that matters here is None.
        checkpoints_folder: where state is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        scorer: Scorer,
        rows: Sequence[TokenRow],
        held_out: Sequence[TokenRow],
        recipe: Recipe,
        checkpoints_folder: Any,
        watcher: Watcher,
    ):
        assert recipe.steps is not None
        assert recipe.batch_size is not None
        self.model, self.scorer, self.recipe, self.watcher = model, scorer, recipe, watcher
        self.rows, self.held_out = rows, held_out
        self.total = recipe.steps
        self.plan = BatchPlan([len(r) for r in rows], recipe.batch_size, recipe.seed, grouped=not scorer.layout.packed)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise LorakitError("training: the model has no trainable parameter; attach an adapter first")
        self.optimizers = build_optimizers(self.parameters.items(), recipe)
        self.checkpoints = Checkpoints(checkpoints_folder, self.parameters, self.optimizers, recipe.keep)
        self.progress = Progress()
        self._stop = False
        device = scorer.device.type
        # fp32 masters with bf16 arithmetic, where the hardware gains from it; adapters over a bf16
        # base follow the base's precision by themselves.
        self._mixed = recipe.method == "full" and recipe.precision == "bf16" and fast_bf16(device)
        if recipe.checkpointing:
            _recompute(model)

    # ----------------------------------------------------------------- one step

    def _arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        if self._mixed:
            return torch.autocast(self.scorer.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _backward(self, indices: Sequence[int]) -> float:
        """Gradients of the mean loss over all loss tokens of the step; returns that mean.

        The sum over tokens is divided by the step's global count, so neither the number of forward
        passes nor the lengths in each of them changes the result.
        """
        count = sum(self.rows[i].loss_tokens for i in indices)
        total = torch.zeros((), device=self.scorer.device)
        for part in self._parts(indices):
            with self._arithmetic():
                loss = self.scorer.loss_sum([self.rows[i] for i in part]) / count
            loss.backward()
            total += loss.detach()
        return float(total)

    def _parts(self, indices: Sequence[int]) -> list[list[int]]:
        """The forward passes of a step."""
        return micro_batches(indices, self._cost, self.recipe.micro_tokens, self.recipe.grad_accum)

    def _cost(self, indices: Sequence[int]) -> int:
        return self.scorer.cost([self.rows[i] for i in indices])

    def _step(self) -> tuple[float, float, float]:
        """One optimiser step: (loss, gradient norm, learning rate)."""
        step, recipe = self.progress.step, self.recipe
        assert recipe.lr is not None
        lr = recipe.lr * lr_factor(step, self.total, recipe.schedule, recipe.warmup_ratio, recipe.min_lr_ratio)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("ratio", 1.0)
            optimizer.zero_grad(set_to_none=True)
        loss = self._backward(self.plan.step(step))
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), recipe.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise LorakitError(
                f"training: the loss is {loss} and the gradient norm {norm} at step {step + 1}; nothing was applied. "
                f"Start again with a lower lr (it is {recipe.lr:g})"
            )
        for optimizer in self.optimizers:
            optimizer.step()
        return loss, norm, lr

    def rehearse(self) -> None:
        """The heaviest forward pass of the first epoch, forward and backward, before anything counts.

        If memory does not suffice, it fails in the first second and not at step 128.
        """
        steps = min(self.total, self.plan.steps_per_epoch)
        heaviest = max((part for i in range(steps) for part in self._parts(self.plan.step(i))), key=self._cost)
        state = random_state()
        try:
            self._backward(heaviest)
        except torch.OutOfMemoryError:
            raise LorakitError(
                f"training: the heaviest batch ({self._cost(heaviest)} tokens) does not fit in the device's memory. "
                f"Lower micro_tokens (it is {self.recipe.micro_tokens}), or set checkpointing: true"
            ) from None
        restore_random_state(state)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # --------------------------------------------------------------- evaluation

    def evaluate(self) -> float:
        """Mean loss over the held-out rows' loss tokens, in nats."""
        self.model.eval()
        loss = mean_loss(self.scorer, self.held_out, self.recipe.micro_tokens, self._arithmetic)
        self.model.train()
        return loss

    def _evaluate(self, log: EventLog) -> bool:
        """Evaluate and keep the best; True when it is time to stop early."""
        loss = self.evaluate()
        progress = self.progress
        is_best = progress.best_loss is None or loss < progress.best_loss
        if is_best:
            progress.best_loss, progress.best_step, progress.evaluations_without_gain = loss, progress.step, 0
            if self.recipe.keep_best:
                progress.best_checksum = self.checkpoints.save_best(progress.step)
        else:
            progress.evaluations_without_gain += 1
        log.write("eval", progress.step, loss=loss, best=is_best)
        self.watcher.evaluated(progress.step, loss, is_best)
        return self.recipe.patience is not None and progress.evaluations_without_gain >= self.recipe.patience

    # ---------------------------------------------------------------------- run

    def run(self, log: EventLog) -> Progress:
        """Train to the end; leaves the best weights (or the last) in the model.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, after the running step is done and saved.
            LorakitError: a loss that is not finite.
        """
        progress = self.progress
        self.model.train()
        self.watcher.begin(self.total, progress)
        try:
            with self._signals(), self.scorer.active():
                if progress.step < self.total:
                    self.rehearse()
                if progress.step == 0 and not self.checkpoints.steps():
                    if self.held_out:
                        self._evaluate(log)
                    self.checkpoints.save(progress)  # a disk that is full should say so now
                while progress.step < self.total and not progress.stopped_early:
                    self._one(log)
        finally:
            self.watcher.end()
        self._keep_best()
        if not all(torch.isfinite(p).all() for p in self.parameters.values()):
            raise LorakitError(
                f"training: the trained weights are not finite; nothing was saved. Lower lr (it is {self.recipe.lr:g})"
            )
        self.model.eval()
        return progress

    def _keep_best(self) -> None:
        progress = self.progress
        if not self.recipe.keep_best or progress.best_step in (None, progress.step):
            return
        assert progress.best_step is not None
        try:
            self.checkpoints.load_best(progress.best_step, progress.best_checksum)
        except LorakitError as error:
            self.watcher.note(f"the best weights cannot be read ({error}); the last ones are kept")
            return
        if progress.best_step == 0:
            self.watcher.note(
                "no evaluation was better than the start: the result is the base unchanged. Try another lr, or look at: "
                "lorakit data check"
            )
        else:
            self.watcher.note(f"the weights of step {progress.best_step} are kept: the best held-out loss")

    def _one(self, log: EventLog) -> None:
        progress, recipe = self.progress, self.recipe
        started = time.perf_counter()
        indices = self.plan.step(progress.step)
        loss, norm, lr = self._step()
        progress.step += 1
        tokens = sum(len(self.rows[i]) for i in indices)
        seconds = time.perf_counter() - started
        progress.tokens += tokens
        progress.loss_tokens += sum(self.rows[i].loss_tokens for i in indices)
        progress.seconds += seconds
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, peak_memory_bytes(str(self.scorer.device)))
        log.write(
            "step", progress.step, loss=loss, lr=lr, grad_norm=norm, tokens=tokens, seconds=round(seconds, 4)
        )  # fmt: skip
        self.watcher.step(self.total, progress, loss, progress.tokens / progress.seconds)
        self._alarm(loss, log)
        last = progress.step == self.total
        if self.held_out and recipe.eval_steps and (last or progress.step % recipe.eval_steps == 0):
            progress.stopped_early = self._evaluate(log) and not last
            if progress.stopped_early:
                self.watcher.note(f"stopped early: {recipe.patience} evaluations without gain")
        if last or self._stop or progress.stopped_early or progress.step % (recipe.save_steps or self.total) == 0:
            self.checkpoints.save(progress)
        if self._stop and not last:
            raise Interrupted(progress.step)

    def _alarm(self, loss: float, log: EventLog) -> None:
        """Say so, once, when the loss has not fallen after a fifth of the steps."""
        progress = self.progress
        window = max(3, self.total // 20)
        if len(progress.first_losses) < window:
            progress.first_losses.append(loss)
        progress.last_losses = [*progress.last_losses, loss][-window:]
        if progress.alarmed or progress.step < max(self.total // 5, 2 * window):
            return
        progress.alarmed = True  # looked at once
        first, now = (sum(v) / len(v) for v in (progress.first_losses, progress.last_losses))
        if now > first - 0.01 * abs(first):
            text = (
                f"the loss has not fallen: {first:.3f} at the start, {now:.3f} after {progress.step} of {self.total} "
                f"steps. Try lr {self.recipe.lr * 3:g} or {self.recipe.lr / 3:g}, and look at: lorakit data check"  # type: ignore[operator]
            )
            log.write("alarm", progress.step, text=text)
            self.watcher.note(text)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM ask for a stop after the running step; a second Ctrl-C is immediate."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True
            self.watcher.note("stopping after this step; press Ctrl-C again to stop at once")

        try:
            before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: signals are somebody else's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def mean_loss(
    scorer: Scorer,
    rows: Sequence[TokenRow],
    micro_tokens: int = 16384,
    arithmetic: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> float:
    """Mean −log p over the rows' loss tokens, in nats a token. Call it inside `scorer.active()`."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    total = 0.0
    with torch.no_grad():
        for part in micro_batches(order, lambda p: scorer.cost([rows[i] for i in p]), micro_tokens):
            with arithmetic():
                total += float(scorer.loss_sum([rows[i] for i in part]))
    return total / sum(row.loss_tokens for row in rows)


def _recompute(model: Any) -> None:
    """Switch activation checkpointing on, by whichever public name this transformers has."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    elif hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(options)
    else:
        raise LorakitError(f"checkpointing: {type(model).__name__} cannot recompute activations")
