"""Generating answers, batched or streamed, through transformers' `generate`."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.base.load import context_length
from lorakit.errors import LorakitError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None


@dataclass(frozen=True)
class Answer:
    """Generated tokens without the stop token; `stopped` is False when the length ran out."""

    tokens: tuple[int, ...]
    text: str
    stopped: bool


def _config(model: Any, sampling: Sampling, stop: Sequence[int], prompt: int) -> Any:
    """transformers' settings for prompts of at most `prompt` tokens, within the model's positions."""
    from transformers import GenerationConfig

    room = context_length(model) - prompt
    if room < 1:
        raise LorakitError(f"generate: the prompt has {prompt} tokens; the model has positions for {prompt + room}")
    options: dict[str, Any] = {}
    if sampling.temperature > 0:
        options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    pad = model.tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, room),
        do_sample=sampling.temperature > 0,
        eos_token_id=list(stop),
        pad_token_id=pad if pad is not None else stop[0],
        **options,
    )


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    sampling: Sampling = Sampling(),
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answers to tokenised prompts, in their order.

    Args:
        model: with `.tokenizer`; its active adapter answers.
        prompts: token ids of each.
        stop: the tokens that end an answer.
        progress: is told how many more are done.
    """
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    device = next(model.parameters()).device
    answers: dict[int, Answer] = {}
    room = context_length(model) - sampling.max_new_tokens
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    easy = [i for i in order if len(prompts[i]) <= room]
    batches = [easy[start : start + batch_size] for start in range(0, len(easy), batch_size)]
    batches += [[i] for i in order if len(prompts[i]) > room]  # near the end of the context each goes alone
    for chosen in batches:
        config = _config(model, sampling, stop, max(len(prompts[i]) for i in chosen))
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), config.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):  # padded on the left: answers begin in one column
            ids[row, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[row, width - len(prompts[i]) :] = 1
        with torch.inference_mode():
            made = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        for row, i in enumerate(chosen):
            answers[i] = _answer(model, made[row, width:].tolist(), stop)
        progress(len(chosen))
    return [answers[i] for i in range(len(prompts))]


def _answer(model: Any, tokens: list[int], stop: Sequence[int]) -> Answer:
    end = next((k for k, token in enumerate(tokens) if token in stop), None)
    kept = tokens if end is None else tokens[:end]
    return Answer(tuple(kept), model.tokenizer.decode(kept, skip_special_tokens=True).strip(), end is not None)


def stream(model: Any, prompt: Sequence[int], stop: Sequence[int], sampling: Sampling = Sampling()) -> Iterator[str]:
    """The answer to one prompt, piece by piece as it is made."""
    from transformers import StoppingCriteria, TextIteratorStreamer

    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    config = _config(model, sampling, stop, len(prompt))
    streamer = TextIteratorStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
    abandoned = threading.Event()
    failure: list[BaseException] = []

    class _Abandoned(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), abandoned.is_set(), device=input_ids.device)

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=[_Abandoned()],
                )
        except BaseException as error:  # told to the reader, who would wait for ever otherwise
            failure.append(error)
            streamer.end()

    # A new thread starts outside every `using` block; it has to answer with this one's adapter.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        thread.join()
    if failure:
        raise failure[0]
