"""Exact spans: what is trained is the answer and its end-of-turn token, nothing else."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lorakit.data.dataset import encode, hold_out, prompt_key, stop_tokens
from lorakit.data.formats import Example, Format
from lorakit.data.template import Template
from lorakit.errors import LorakitError
from tests.conftest import TINY

FORM = Format("prompt-completion", {})
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (  # drops what the assistant thought in earlier turns, as Qwen 3's does
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}(hm) {% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """A tokenizer that glues a space to the word after it, so that prompt and answer can straddle."""
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<eos>", "ask", "Ġask", "Ġanswer", "answer", "Ġ"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def trained_text(tokenizer, row) -> list[str]:
    runs, current = [], []
    for token, flag in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True):
        if flag:
            current.append(token)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return [*runs, tokenizer.decode(current)] if current else runs


CHAT = Example(
    "here",
    messages=(
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "uno"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "dos"},
    ),
)


@pytest.mark.parametrize(
    ("chat", "end"), [(None, "<|end|>"), (CHATML, "<|im_end|>")], ids=["built-in template", "chatml"]
)
def test_assistant_turns_are_trained_to_their_end(tokenizer, chat: str | None, end: str) -> None:
    template = Template(tokenizer, text=chat)
    assert trained_text(tokenizer, template.encode(CHAT)) == [f"uno{end}", f"dos{end}"]
    assert trained_text(tokenizer, template.encode(CHAT, "last")) == [f"dos{end}"]
    everything = template.encode(CHAT, "all")
    assert everything.loss_mask.all()
    assert bool(template.encode(CHAT).loss_mask[-1]), "the last token is trained: it is the end of turn"


def test_training_sees_what_generation_will_see(tokenizer) -> None:
    """The tokens before the answer are exactly those of the prompt at generation."""
    for chat in (None, CHATML):
        template = Template(tokenizer, text=chat)
        example = Example("here", prompt="name[Zizzi], near[Café]", completion="Zizzi is near a café.")
        row = template.encode(example)
        asked = template.encode_prompt(example.prompt)
        assert row.input_ids[: len(asked)].tolist() == asked
        assert not row.loss_mask[: len(asked)].any()
        assert row.loss_mask[len(asked) :].all()


def test_a_message_can_be_left_untrained(tokenizer) -> None:
    messages = [dict(m) for m in CHAT.messages or ()]
    messages[1]["weight"] = 0
    row = Template(tokenizer).encode(Example("here", messages=tuple(messages)))
    assert trained_text(tokenizer, row) == ["dos<|end|>"]


def test_a_template_that_rewrites_history_is_an_error_not_a_guess(tokenizer) -> None:
    template = Template(tokenizer, text=FORGETFUL)
    with pytest.raises(LorakitError, match="rewrites message 2"):
        template.encode(CHAT)
    assert trained_text(tokenizer, template.encode(CHAT, "last")) == ["(hm) dos<|end|>"]


def test_a_token_across_the_border_is_not_split_wrongly(words) -> None:
    """``ask `` + ``answer`` would be one token `` answer``; generation sees the prompt's space alone."""
    template = Template(words, text="{% for m in messages %}{{ m.content }}{% endfor %}")
    row = template.encode(Example("here", prompt="ask ", completion="answer"))
    asked = template.encode_prompt("ask ")
    assert row.input_ids.tolist() == [*asked, words.convert_tokens_to_ids("answer")]
    assert row.loss_mask.tolist() == [False] * len(asked) + [True]


def test_without_a_template_prompt_completion_and_end(tokenizer) -> None:
    template = Template(tokenizer, "none")
    row = template.encode(Example("here", prompt="The king", completion=" was old."))
    assert trained_text(tokenizer, row) == [" was old.<|eos|>"]
    assert row.input_ids[: len(template.encode_prompt("The king"))].tolist() == template.encode_prompt("The king")
    text = template.encode(Example("here", text="Once."))
    assert text.input_ids[0] == tokenizer.bos_token_id
    assert text.input_ids[-1] == tokenizer.eos_token_id
    assert text.loss_mask.tolist() == [False] + [True] * (len(text) - 1)


def test_chats_without_a_template_use_plain_words(words) -> None:
    template = Template(words)
    row = encode([CHAT], FORM, template, max_length=512).rows[0]
    assert row.loss_mask.any()
    assert row.input_ids[-1] == words.eos_token_id
    assert template.chat is not None, "it is the template from now on, in generation too"
    asked = template.encode_prompt((CHAT.messages or ())[:1])
    assert row.input_ids[: len(asked)].tolist() == asked


def test_stop_tokens_include_the_templates_end(tokenizer) -> None:
    model = type("M", (), {"generation_config": None, "tokenizer": tokenizer})()
    data = encode([CHAT], FORM, Template(tokenizer), max_length=512)
    assert stop_tokens(model, data) == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert stop_tokens(model) == [tokenizer.eos_token_id]


class TestOverlong:
    LONG = Example("row 2", prompt="a b c d", completion="one two three four five six seven eight nine ten")
    SHORT = Example("row 1", prompt="a", completion="b")

    def encode(self, tokenizer, overlong: str, max_length: int = 14):
        return encode([self.SHORT, self.LONG], FORM, Template(tokenizer), max_length=max_length, overlong=overlong)

    def test_error_counts_and_names(self, tokenizer) -> None:
        with pytest.raises(
            LorakitError, match=r"1 of 2 rows are longer than max_length 14 \(longest: row 2, \d+ tokens\)"
        ):
            self.encode(tokenizer, "error")

    def test_drop_says_so(self, tokenizer) -> None:
        data = self.encode(tokenizer, "drop")
        assert len(data.rows) == 1
        assert "left out" in data.notes[0]

    def test_truncate_keeps_the_end_of_turn(self, tokenizer) -> None:
        data = self.encode(tokenizer, "truncate")
        row = data.rows[1]
        assert len(row) == 14
        assert row.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
        assert bool(row.loss_mask[-1])

    def test_truncating_the_whole_answer_away_is_an_error(self, tokenizer) -> None:
        with pytest.raises(LorakitError, match="prompt alone fills"):
            self.encode(tokenizer, "truncate", max_length=8)

    def test_split_is_for_text(self, tokenizer) -> None:
        with pytest.raises(LorakitError, match="split would part its answer"):
            self.encode(tokenizer, "split")
        template = Template(tokenizer)
        example = Example("book", text="The king was old. " * 40)
        whole = template.encode(example)
        data = encode([example], FORM, template, max_length=16, overlong="split")
        assert max(data.lengths) == 16
        assert data.loss_tokens == whole.loss_tokens, "every token is learnt once"


def test_held_out_prompts_are_not_trained_on(tokenizer) -> None:
    examples = [Example(f"row {i}", prompt=f"question {i // 3}", completion=f"answer {i}") for i in range(60)]
    data = encode(examples, FORM, Template(tokenizer), max_length=64)
    train, held = hold_out(data, 0.1, seed=0)
    assert len(train.rows) + len(held.rows) == 60
    assert 6 <= len(held.rows) <= 8
    assert not {prompt_key(e) for e in train.examples} & {prompt_key(e) for e in held.examples}
    again = hold_out(data, 0.1, seed=0)[1]
    assert [e.where for e in again.examples] == [e.where for e in held.examples]
    with pytest.raises(LorakitError, match="leaves nothing to train on"):
        hold_out(data, 60, seed=0)


def test_the_fingerprint_sees_tokens_and_masks(tokenizer) -> None:
    template = Template(tokenizer)
    one = encode([CHAT], FORM, template, max_length=64)
    assert one.fingerprint() == encode([CHAT], FORM, template, max_length=64).fingerprint()
    assert one.fingerprint() != encode([CHAT], FORM, template, max_length=64, loss="last").fingerprint()


def test_a_row_with_nothing_to_train(tokenizer) -> None:
    messages = [dict(m, weight=0) for m in CHAT.messages or ()]
    with pytest.raises(LorakitError, match="here: no token of this row would be trained"):
        Template(tokenizer).encode(Example("here", messages=tuple(messages)))


def test_tool_calls_that_the_template_leaves_out_are_an_error(tokenizer) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(LorakitError, match="leaves its tool_calls out"):
        Template(tokenizer).encode(Example("here", messages=({"role": "user", "content": "u"}, call)))


def test_only_special_tokens_end_an_answer(tokenizer) -> None:
    """A template without an end of turn: the full stop that every answer ends in must not stop generation."""
    template = Template(tokenizer, text="{% for m in messages %}{{ m.content }}{% endfor %}")
    model = type("M", (), {"generation_config": None, "tokenizer": tokenizer})()
    data = encode(
        [Example(f"{i}", prompt="ask ", completion="It is.") for i in range(3)], FORM, template, max_length=64
    )
    assert stop_tokens(model, data) == [tokenizer.eos_token_id]


def test_one_prompt_with_nearly_all_rows_stays_in_training(tokenizer) -> None:
    examples = [Example(f"{i}", prompt="a" if i == 0 else "b", completion=f"{i}") for i in range(61)]
    data = encode(examples, FORM, Template(tokenizer), max_length=64)
    for seed in range(5):
        train, held = hold_out(data, 0.05, seed)
        assert len(train.rows) == 60
        assert [e.prompt for e in held.examples] == ["a"]
