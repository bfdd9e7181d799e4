"""The `lorakit` command: the table of verbs, and what happens to mistakes.

Nothing heavy is imported before a verb runs, so that `lorakit --help` answers at once.
"""

from __future__ import annotations

import errno
import sys

import typer

from lorakit import __version__
from lorakit.cli import chat, data, doctor, evaluate, generate, train
from lorakit.errors import LorakitError

app = typer.Typer(
    help="Fine-tune any Hugging Face model with low-rank adapters, on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("train", context_settings=train.CONTEXT)(train.train)
app.command("resume")(train.resume)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        print(f"lorakit {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command. A user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except LorakitError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        _fail(f"{error.filename or 'output'}: no space left to write it. Free some and run again")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
