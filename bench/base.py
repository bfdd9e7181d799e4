"""Held-out loss of bases, on the passages that a pretraining run kept out.

    python bench/base.py RUN MODEL [MODEL …] [--json FILE]

RUN is a run of `examples/pretrain/pretrain.py`, whose corpus must still be where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import lorakit
from lorakit.base.forward import Scorer
from lorakit.data.dataset import encode, hold_out, read_examples
from lorakit.data.template import Template
from lorakit.recipes.load import read_yaml
from lorakit.training.loop import mean_loss
from lorakit.training.prepare import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--json", type=Path, default=Path("bench/results/base.json"))
    given = parser.parse_args()
    recipe = read_yaml(given.run / "recipe.yaml")
    bases = {name: lorakit.load_base(name, precision="fp32") for name in given.models}
    template = Template(next(iter(bases.values())).tokenizer)
    data = encode(*read_examples(recipe["data"], "text"), template, max_length=recipe["max_length"], overlong="split")
    held = hold_out(data, recipe["val_size"], recipe["seed"])[1]
    kinds: dict[str, list] = {"text": [], "conversations": []}
    for row, example in zip(held.rows, held.examples, strict=True):
        kinds["conversations" if example.where.startswith("chats.jsonl") else "text"].append(row)
    results = {}
    for name, model in bases.items():
        scorer = Scorer(model)
        with scorer.active():
            results[Path(name).name] = {kind: mean_loss(scorer, rows) for kind, rows in kinds.items() if rows}
        print(Path(name).name, {kind: round(loss, 3) for kind, loss in results[Path(name).name].items()})
    rows = {kind: len(r) for kind, r in kinds.items()}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(
        json.dumps({"rows": rows, "nats_per_token": results, "versions": versions()}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
