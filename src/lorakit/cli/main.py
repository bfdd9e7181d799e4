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
    rich_markup_mode=None,  # plain help: rich would take a quarter of its half second
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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "no space left to write it; free some and run again" if full else error.strerror or str(error)
        _fail(f"{error.filename}: {reason}" if error.filename else reason)
    except UnicodeEncodeError:
        _fail("a prompt or a file name holds characters that are not UTF-8 text")


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
