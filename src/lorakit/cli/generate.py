"""`lorakit generate`: answers to one prompt, to several, or to every line of a file."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorakit.errors import LorakitError


def generate(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a model.")],
    prompt: Annotated[list[str] | None, typer.Option(help="May be given several times; else lines of stdin.")] = None,
    model: Annotated[str | None, typer.Option(help="Put the adapter on this base.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.", min=0, max=1)] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16.")] = "auto",
    any_base: Annotated[bool, typer.Option("--any-base", help="Accept an adapter of another base.")] = False,
) -> None:
    """Answer prompts with a run, an adapter or a model."""
    prompts = list(prompt or [])
    if not prompts:
        if sys.stdin.isatty():
            raise LorakitError("generate: give --prompt 'text', or lines on stdin (to talk: lorakit chat)")
        prompts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts or not all(p.strip() for p in prompts):
        raise LorakitError("generate: the prompt is empty")
    "".join(prompts).encode()  # half characters from a broken terminal are no text: said by main()
    from lorakit.cli.target import open_target
    from lorakit.inference.generate import Sampling
    from lorakit.inference.generate import generate as answer

    opened = open_target(target, model, device, precision, any_base)
    tokens = [opened.template.encode_prompt(p) for p in prompts]
    sampling = Sampling(max_new_tokens, temperature, top_p, seed=seed)
    answers = [a.text for a in answer(opened.model, tokens, opened.stop, sampling)]
    if not (compare and hasattr(opened.model, "mounted")):
        print("\n".join(answers))
        return
    with opened.model.using(None):
        before = [a.text for a in answer(opened.model, tokens, opened.stop, sampling)]
    for asked, old, new in zip(prompts, before, answers, strict=True):
        print(f"prompt:  {asked}\nbase:    {old}\nadapter: {new}\n")
