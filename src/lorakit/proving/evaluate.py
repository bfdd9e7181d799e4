"""Scores of a model on held-out examples: loss, BLEU against all references, exact match."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.base.forward import Scorer
from lorakit.base.load import context_length
from lorakit.data.dataset import TokenData, answer_of, prompt_key, prompt_of
from lorakit.data.template import Template
from lorakit.errors import LorakitError, did_you_mean
from lorakit.inference.generate import Answer, Sampling, generate
from lorakit.training.loop import mean_loss

METRICS = ("loss", "bleu", "exact")
_GREEDY = Sampling(max_new_tokens=128)


@dataclass(frozen=True)
class Question:
    """One prompt with every reference answer the data has for it."""

    prompt: list[int]
    shown: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """`values` by metric; `answers` in the order of `questions` (empty when nothing was generated).

    `too_long` counts prompts that fill the model's context, so that no answer could be made.
    """

    values: dict[str, float]
    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]
    too_long: int = 0

    @property
    def unfinished(self) -> int:
        """Answers that ran into the length limit without an end."""
        return sum(not answer.stopped for answer in self.answers)


def prompts_in(data: TokenData) -> int:
    """How many different prompts the data has."""
    return len({prompt_key(example) for example in data.examples})


def questions_of(data: TokenData, template: Template, limit: int | None = None) -> list[Question]:
    """The different prompts of a data set, each with all its references, in order of appearance."""
    if any(example.text is not None for example in data.examples):
        raise LorakitError("eval: plain text has no prompts and answers; only --metrics loss can be measured")
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(data.examples):
        groups.setdefault(prompt_key(example), []).append(i)
    questions = []
    for indices in list(groups.values())[:limit]:
        example = data.examples[indices[0]]
        plain = example.prompt is not None and template.chat is None
        prompt = template.encode_prompt(example.prompt or "" if plain else prompt_of(example), example.where)
        references = tuple(answer_of(data.examples[i]) for i in indices)
        questions.append(Question(prompt, str(prompt_of(example)[-1]["content"]), references))
    return questions


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU by sacrebleu, every answer against all of its references."""
    import sacrebleu

    most = max(len(r) for r in references)
    # sacrebleu takes None where a prompt has fewer references than another; its annotation does not say so.
    streams: Any = [[r[k] if k < len(r) else None for r in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), streams).score)


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of answers that equal a reference, white space at the ends apart."""
    hits = sum(a.strip() in {r.strip() for r in refs} for a, refs in zip(answers, references, strict=True))
    return hits / len(answers)


def check_metrics(metrics: Sequence[str]) -> None:
    if not metrics:
        raise LorakitError(f"eval: no metric was named; known are {', '.join(METRICS)}")
    for metric in metrics:
        if metric not in METRICS:
            raise LorakitError(f"eval: {metric!r} is none of {', '.join(METRICS)}. {did_you_mean(metric, METRICS)}")


def evaluate(
    model: Any,
    data: TokenData,
    template: Template,
    stop: Sequence[int],
    metrics: Sequence[str] = METRICS,
    sampling: Sampling = _GREEDY,
    limit: int | None = None,
    batch_size: int = 64,
    scorer: Scorer | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Score the model's active adapter (or the base) on data.

    Args:
        limit: generate for at most this many prompts; the loss is over all rows.
        scorer: one for this model, if it is already there.
    """
    check_metrics(metrics)
    model.eval()
    values: dict[str, float] = {}
    if "loss" in metrics:
        scorer = scorer or Scorer(model)
        with scorer.active():
            values["loss"] = mean_loss(scorer, data.rows)
    if not {"bleu", "exact"} & set(metrics):
        return Scores(values, (), ())
    asked = questions_of(data, template, limit)
    questions = [q for q in asked if len(q.prompt) < context_length(model)]
    if not questions:
        return Scores(values, (), (), len(asked))
    answers = generate(model, [q.prompt for q in questions], stop, sampling, batch_size, progress)
    texts, references = [a.text for a in answers], [q.references for q in questions]
    if "bleu" in metrics:
        values["bleu"] = bleu(texts, references)
    if "exact" in metrics:
        values["exact"] = exact_match(texts, references)
    return Scores(values, tuple(questions), tuple(answers), len(asked) - len(questions))
