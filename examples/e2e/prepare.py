"""How train.jsonl, validation.jsonl and test.jsonl were made from the E2E NLG challenge's files.

    python examples/e2e/prepare.py FOLDER_WITH_THE_CSV_FILES

Training rows are a seeded sample of the challenge's training set; validation rows come from its
development set; test rows are meaning representations of its test set with all their references.
No meaning representation is in two of the files.
"""

from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

TRAIN_ROWS, VALIDATION_PROMPTS, TEST_PROMPTS = 12_000, 20, 80


def read(path: Path) -> dict[str, list[str]]:
    """Meaning representation → its sentences, in the file's order."""
    groups: dict[str, list[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(row["mr"], []).append(row["ref"])
    return groups


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = (json.dumps({"prompt": mr, "completion": ref}, ensure_ascii=False) for mr, ref in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(rows)} rows, {len({mr for mr, _ in rows})} meaning representations")


def main() -> None:
    source, here = Path(sys.argv[1]), Path(__file__).parent
    chance = random.Random(0)
    train, dev, test = (read(source / f"{name}.csv") for name in ("trainset", "devset", "testset_w_refs"))
    validation = chance.sample([mr for mr in dev if mr not in train and mr not in test], VALIDATION_PROMPTS)
    held_out = chance.sample([mr for mr in test if mr not in train and mr not in validation], TEST_PROMPTS)
    rows = [(mr, ref) for mr, refs in train.items() if mr not in test for ref in refs]
    write(here / "train.jsonl", chance.sample(rows, TRAIN_ROWS))
    write(here / "validation.jsonl", [(mr, ref) for mr in validation for ref in dev[mr]])
    write(here / "test.jsonl", [(mr, ref) for mr in held_out for ref in test[mr]])


if __name__ == "__main__":
    main()
