from __future__ import annotations

import pytest
import sacrebleu

from lorakit.data.dataset import encode
from lorakit.data.formats import Example, Format
from lorakit.data.template import Template
from lorakit.proving.evaluate import bleu, exact_match, questions_of


def test_bleu_counts_every_reference() -> None:
    answers = ["the cat sat on the mat today", "a dog ran over the green hill"]
    references = [("the cat sat on the mat today",), ("x", "a dog ran over the green hill", "z")]
    assert bleu(answers, references) == pytest.approx(100)
    # With an equal number of references it is sacrebleu's own figure.
    equal = [("the cat sat here on a mat", "one cat sat"), ("a dog ran over a hill", "dogs run")]
    streams = [[r[k] for r in equal] for k in range(2)]
    assert bleu(answers, equal) == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score)
    assert bleu(answers, equal) < 60


def test_exact_match() -> None:
    assert exact_match(["a ", "b", "c"], [("a",), ("x", "b"), ("d",)]) == pytest.approx(2 / 3)


def test_references_are_grouped_by_prompt() -> None:
    from transformers import AutoTokenizer

    from tests.conftest import TINY

    template = Template(AutoTokenizer.from_pretrained(TINY))
    rows = [Example(f"{i}", prompt=p, completion=c) for i, (p, c) in enumerate([("q", "1"), ("r", "2"), ("q", "3")])]
    data = encode(rows, Format("prompt-completion", {}), template, max_length=64)
    questions = questions_of(data, template)
    assert [(q.shown, q.references) for q in questions] == [("q", ("1", "3")), ("r", ("2",))]
    assert questions[0].prompt == template.encode_prompt("q")
