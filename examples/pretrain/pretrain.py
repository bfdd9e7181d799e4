"""Pretrain a small base like the built-in one, with lorakit's own training loop.

    python examples/pretrain/pretrain.py CORPUS                        # the built-in base, further
    python examples/pretrain/pretrain.py CORPUS --size 14m --scratch   # a larger one from its config (GPU)

CORPUS is a folder or file of documents with a `text` field (JSONL, also .xz or .gz). The run can be
stopped and resumed like any other (`lorakit resume RUN`); the model is in RUN/model.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import lorakit
from lorakit.base.files import BUILT_IN
from lorakit.base.load import load_tokenizer
from lorakit.data.dataset import read_examples
from lorakit.data.template import Template, as_messages

SIZES = {
    "4m": {},
    "14m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 7, "num_attention_heads": 12,
            "num_key_value_heads": 6},
}  # fmt: skip


def make_config(folder: Path, size: str) -> Path:
    """A model folder without weights: the built-in tokenizer and a config of another size."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in BUILT_IN["tiny"].iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text()) | SIZES[size]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def with_chats(folder: Path, corpus: Path, chats: list[str]) -> str:
    """The corpus and conversations written out with the built-in template, in one folder."""
    template = Template(load_tokenizer(BUILT_IN["tiny"]))
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(corpus.iterdir()) if corpus.is_dir() else [corpus]:
        link = folder / path.name
        if not link.exists():
            link.symlink_to(path.resolve())
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for source in chats:
            for example in read_examples(source)[0]:
                text = template.tokenizer.apply_chat_template(list(as_messages(example)), tokenize=False)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    parser.add_argument("--size", choices=SIZES, default="4m")
    parser.add_argument("--scratch", action="store_true", help="start from random weights")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon pays on a GPU only")
    parser.add_argument("--documents", type=int, help="use only the first ones")
    parser.add_argument("--chat", action="append", default=[], help="examples that give the role tokens meaning")
    parser.add_argument("--run", default="runs/pretrain")
    given = parser.parse_args()
    model = "tiny"
    if given.scratch:
        model = str(make_config(Path(given.run + "-config"), given.size))
    corpus = given.corpus
    if given.chat:
        corpus = with_chats(Path(given.run + "-corpus"), Path(corpus), given.chat)
    run = lorakit.train(
        model,
        corpus,
        method="full",
        precision="bf16",
        weights="random" if given.scratch else "pretrained",
        optimizer=given.optimizer,
        format="text",
        overlong="split",
        max_length=given.window,
        max_rows=given.documents,
        val_size=200,
        steps=given.steps,
        batch_size=given.batch_size,
        lr=given.lr,
        schedule="linear",
        warmup_ratio=0.05,
        weight_decay=0.05,
        betas=(0.9, 0.95),
        micro_tokens=8192,
        output_dir=given.run,
    )
    print(json.dumps(run.summary, indent=2))


if __name__ == "__main__":
    main()
