"""`lorakit chat`: talk to a run, an adapter or a model; answers appear as they are made."""

from __future__ import annotations

from typing import Annotated, Any

import typer

_HELP = "/reset forgets the conversation, /base switches the adapter off and on, /quit ends (so does Ctrl-D)"


def chat(
    target: Annotated[str, typer.Argument(help="A run, an adapter, or a model.")],
    model: Annotated[str | None, typer.Option(help="Put the adapter on this base.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.", min=1)] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.", min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.", min=0, max=1)] = 0.95,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16.")] = "auto",
    any_base: Annotated[bool, typer.Option("--any-base", help="Accept an adapter of another base.")] = False,
) -> None:
    """Talk to a run, an adapter or a model."""
    from lorakit.base.load import context_length
    from lorakit.cli.show import console
    from lorakit.cli.target import open_target
    from lorakit.inference.generate import Sampling, stream

    opened = open_target(target, model, device, precision, any_base)
    adapted = hasattr(opened.model, "mounted")
    adapter = opened.model.active if adapted else None
    context = context_length(opened.model)
    console.print(f"[bold]{opened.label}[/]\n[dim]{_HELP}[/]")
    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while True:
        try:
            asked = console.input("\n[cyan]you[/] › ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if not asked:
            continue
        if asked.startswith("/"):
            if asked in ("/quit", "/exit"):
                return
            if asked == "/reset":
                messages = list(opening)
                console.print("[dim]a new conversation[/]")
            elif asked == "/base" and adapted:
                opened.model.switch(None if opened.model.active else adapter)
                console.print(f"[dim]adapter {'on' if opened.model.active else 'off'}[/]")
            else:
                console.print(f"[dim]{_HELP}[/]")
            continue
        messages.append({"role": "user", "content": asked})
        single = opened.template.chat is None
        prompt = opened.template.encode_prompt(asked if single else messages)
        while len(prompt) + max_new_tokens > context and len(messages) > len(opening) + 1 and not single:
            del messages[len(opening) : len(opening) + 2]
            console.print("[dim](the oldest turns no longer fit and were left out)[/]")
            prompt = opened.template.encode_prompt(messages)
        room = min(max_new_tokens, context - len(prompt))
        if room < 1:
            console.print(f"[yellow]that is {len(prompt)} tokens; the model has room for {context}[/]")
            messages.pop()
            continue
        said = ""
        console.print("[green]model[/] › ", end="")
        pieces = stream(opened.model, prompt, opened.stop, Sampling(room, temperature, top_p))
        try:
            for piece in pieces:
                said += piece
                console.print(piece, end="", markup=False, soft_wrap=True)
        except KeyboardInterrupt:  # ends the answer, not the conversation
            pieces.close()  # type: ignore[attr-defined]
        console.print()
        messages.append({"role": "assistant", "content": said.strip()})
