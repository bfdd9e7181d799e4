from __future__ import annotations

import gzip
import json
import lzma

import pytest

from lorakit.data.formats import recognise, to_example
from lorakit.data.read import read_records
from lorakit.errors import LorakitError

ROWS = [{"prompt": "a", "completion": "é"}, {"prompt": "b", "completion": 'x, "y"\nz'}]


def test_the_same_rows_from_every_kind_of_file(tmp_path) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "bom.jsonl").write_text(lines, encoding="utf-8-sig")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "a.csv").write_text('prompt,completion\na,é\nb,"x, ""y""\nz"\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\na\té\nb\t"x, ""y""\nz"\n', encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write(lines)
    for path in tmp_path.iterdir():
        assert [r.fields for r in read_records(str(path))] == ROWS, path
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.jsonl").write_text(lines, encoding="utf-8")
    (folder / "2.jsonl").write_text(lines, encoding="utf-8")
    assert [r.fields for r in read_records(str(folder))] == ROWS * 2


def test_parquet_through_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert [r.fields for r in read_records(str(tmp_path / "a.parquet"))] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": 1}\n{"prompt": \n', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"prompt": 1}\n[1]\n', "a.jsonl, line 2: expected an object"),
        ("a.jsonl", "", "has no rows"),
        ("a.jsonl", "\n\n", "has no rows"),
        ("a.json", '{"a": [1, 2}', "a.json, line 1: not valid JSON"),
        ("a.json", '{"a": 1}', "expected a list of rows"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, line 3: no value for b"),
        ("a.csv", "a,b\n1,2,3\n", "a.csv, line 2: more fields"),
        ("a.doc", "x", "known are .jsonl"),
    ],
)
def test_broken_files_name_the_line(tmp_path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LorakitError, match=said):
        read_records(str(tmp_path / name))


def test_missing_and_undecodable_files(tmp_path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(LorakitError, match="not UTF-8"):
        read_records(str(tmp_path / "train.jsonl"))
    with pytest.raises(LorakitError, match=r"Did you mean .*train\.jsonl"):
        read_records(str(tmp_path / "trian.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-12])
    with pytest.raises(LorakitError, match="damaged or cut short"):
        read_records(str(tmp_path / "cut.jsonl.gz"))


CONVERSATION = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
]


@pytest.mark.parametrize(
    ("row", "name", "prompt", "answer"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, "alpaca", "i\n\nx", "o"),
        ({"instruction": "i", "input": "", "output": "o"}, "alpaca", "i", "o"),
        ({"instruction": "i", "output": "o"}, "alpaca", "i", "o"),
        ({"prompt": "p", "completion": "c"}, "prompt-completion", "p", "c"),
        ({"question": "p", "answer": "c"}, "prompt-completion", "p", "c"),
        ({"text": "t", "label": 3}, "classification", "t", "3"),
        ({"text": "t", "intent": "buy"}, "classification", "t", "buy"),
    ],
)
def test_formats_with_a_prompt(jsonl, row: dict, name: str, prompt: str, answer: str) -> None:
    records = read_records(str(jsonl(row)))
    form = recognise(records)
    example = to_example(records[0], form)
    assert (form.name, example.prompt, example.completion) == (name, prompt, answer)


def test_conversations(jsonl) -> None:
    share = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
    for row, expected in (
        ({"messages": CONVERSATION}, CONVERSATION),
        (share, CONVERSATION[1:]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}, CONVERSATION[2]]},
            CONVERSATION[1:],
        ),
        ({"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:]}, CONVERSATION),
        ({"system": "s", "instruction": "u", "output": "a"}, CONVERSATION),
    ):
        records = read_records(str(jsonl(row)))
        assert list(to_example(records[0], recognise(records)).messages or ()) == expected


def test_plain_text_and_other_columns(jsonl) -> None:
    records = read_records(str(jsonl({"text": "once"})))
    assert to_example(records[0], recognise(records)).text == "once"
    records = read_records(str(jsonl({"mr": "m", "ref": "r"})))
    form = recognise(records, columns={"prompt": "mr", "completion": "ref"})
    assert form.describe() == "prompt-completion (prompt ← mr, completion ← ref)"
    assert to_example(records[0], form).completion == "r"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"promt": "a", "completion": "b"}], "fit no known format.*promt → prompt"),
        ([{"mr": "a", "ref": "b"}], "--columns prompt=mr,completion=ref"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "complete": "b"}], "line 2: no 'completion'.*'complete'"),
        ([{"prompt": "a", "completion": " "}], "line 1: completion is empty"),
        ([{"prompt": "a", "completion": None}], "line 1: 'completion' is null"),
        ([{"prompt": "a", "completion": ["b"]}], "line 1: completion should be text, found list"),
        ([{"messages": []}], "non-empty list of messages"),
        ([{"messages": [{"role": "user", "content": "u"}]}], "no assistant message"),
        ([{"messages": [{"role": "asistant", "content": "u"}]}], "message 1: role 'asistant'.*'assistant'"),
        ([{"messages": [{"role": "user", "text": "u"}]}], "message 1: no 'content'"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}, CONVERSATION[2]]}], "not text"),
    ],
)
def test_wrong_rows_are_named(jsonl, rows: list, said: str) -> None:
    records = read_records(str(jsonl(*rows)))
    with pytest.raises(LorakitError, match=said):
        form = recognise(records)
        for record in records:
            to_example(record, form)


def test_wrong_column_mappings(jsonl) -> None:
    records = read_records(str(jsonl({"mr": "m", "ref": "r"})))
    with pytest.raises(LorakitError, match=r"has mr, ref.*Did you mean 'ref'"):
        recognise(records, columns={"prompt": "mr", "completion": "reff"})
    with pytest.raises(LorakitError, match=r"'promt' is no part.*'prompt'"):
        recognise(records, columns={"promt": "mr"})
    with pytest.raises(LorakitError, match=r"format: 'alpacca'.*'alpaca'"):
        recognise(records, "alpacca")


def test_a_column_that_only_later_rows_have_is_not_lost(jsonl) -> None:
    records = read_records(
        str(
            jsonl(
                {"instruction": "say hi", "output": "hi"}, {"instruction": "translate", "input": "this", "output": "x"}
            )
        )
    )
    form = recognise(records)
    assert [to_example(record, form).prompt for record in records] == ["say hi", "translate\n\nthis"]
