from __future__ import annotations

import pytest
import torch

import lorakit
from lorakit.errors import LorakitError
from lorakit.inference.generate import Sampling, generate, stream
from tests.models import ids, randomise

STOP = [1, 6]


@pytest.fixture(scope="module")
def model(small_model):
    model = lorakit.attach(lorakit.load_base(str(small_model), precision="fp32"), lorakit.LoRA(rank=4))
    randomise(model)
    return model


def prompts() -> list[list[int]]:
    return [ids(1, length, seed=length)[0].tolist() for length in (9, 3, 14, 5)]


def test_a_batch_gives_what_each_prompt_gives_alone(model) -> None:
    """Greedy, by hand: the likeliest token, one after the other, without cache or padding."""
    answers = generate(model, prompts(), STOP, Sampling(max_new_tokens=8))
    for prompt, answer in zip(prompts(), answers, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            while len(tokens) < len(prompt) + 8 and (len(tokens) == len(prompt) or tokens[-1] not in STOP):
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        made = tokens[len(prompt) :]
        stopped = made[-1] in STOP
        assert list(answer.tokens) == (made[:-1] if stopped else made)
        assert answer.stopped == stopped


def test_a_long_neighbour_does_not_shorten_an_answer(model) -> None:
    short, long = prompts()[0], ids(1, 509, seed=4)[0].tolist()
    alone = generate(model, [short], [4095], Sampling(max_new_tokens=20))[0]
    beside = generate(model, [short, long], [4095], Sampling(max_new_tokens=20))
    assert beside[0] == alone
    assert len(beside[1].tokens) == 512 - 509
    with pytest.raises(LorakitError, match="the model has positions for 512"):
        generate(model, [ids(1, 512)[0].tolist()], STOP)


@pytest.mark.parametrize("choice", ["default", None])
def test_streaming_answers_with_the_adapter_of_its_block(model, choice: str | None) -> None:
    prompt = prompts()[2]
    with model.using(choice):
        whole = generate(model, [prompt], STOP, Sampling(max_new_tokens=10))[0].text
        pieces = "".join(stream(model, prompt, STOP, Sampling(max_new_tokens=10)))
    assert pieces.strip() == whole


def test_the_two_answers_differ(model) -> None:
    texts = []
    for choice in ("default", None):
        with model.using(choice):
            texts.append(generate(model, prompts(), STOP, Sampling(max_new_tokens=10)))
    assert texts[0] != texts[1]


def test_leaving_a_stream_early_ends_it(model) -> None:
    pieces = stream(model, prompts()[0], [4095], Sampling(max_new_tokens=400))
    next(pieces)
    pieces.close()
