"""`pissa chat`: talk to a model; from a pipe each line is a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..config.settings import did_you_mean
from ..errors import DataError, PissaError
from ..evaluation.chat_options import BASE, ChatOptions
from ..outside.text import for_terminal
from ..stages import SILENT, stage
from .flags import with_settings
from .output import complain, show
from .places import check_model, check_subject

if TYPE_CHECKING:
    from ..evaluation.chat import Chat

INTERRUPTED = "nothing is kept: the same command starts again"
CUT = "cut by Ctrl-C"
WORDS = {"/reset": "forgets what was said", "/quit": "leaves"}


@with_settings(ChatOptions)
def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL_OR_RUN", help="A model, a run, an export, an adapter, or `pissa init`'s OUT."),
    ],
    settings: dict[str, Any],
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL_OR_RUN",
            help='Let a second one reply too; "base" is the base of the first one\'s adapter (./base a directory).',
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of an adapter that does not record it.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all that was said as one JSON document.")] = False,
) -> None:
    """Talk to MODEL_OR_RUN, for a quick look before it is served.

    On a terminal /reset forgets what was said, /quit leaves, and Ctrl-C ends a reply. From a pipe each line is a
    prompt, and the replies alone go to stdout.
    """
    options = ChatOptions(**settings)
    check_subject(model)
    if compare not in (None, BASE):
        check_subject(compare)
    if base is not None:
        check_model(base)
    from ..evaluation.chat import open_chats
    from ..training.run import quieten

    quieten()
    chats = open_chats(model, options, base=base, compare=compare)
    talk = _Talk(chats, interactive=sys.stdin.isatty(), as_json=as_json)
    with stage(SILENT):  # whoever types has all the time that they want
        exchanges = talk.run()
    if as_json:
        templates = {chat.name: chat.template for chat in chats}
        show({"templates": templates, "settings": asdict(options), "exchanges": exchanges}, "", as_json=True)


class _Talk:
    """Prompts in, replies out."""

    def __init__(self, chats: list[Chat], *, interactive: bool, as_json: bool) -> None:
        self._chats, self._interactive = chats, interactive
        # a document on stdout leaves what a person reads to stderr, and a pipe has no such person
        self._out: TextIO | None = sys.stdout if not as_json else sys.stderr if interactive else None

    def run(self) -> list[dict[str, Any]]:
        """Reply to every prompt; what was said, as it goes into the JSON document."""
        exchanges: list[dict[str, Any]] = []
        for chat in self._chats:
            alone = "" if chat.remembers else "; each prompt stands alone"
            print(f"{for_terminal(chat.name)}: template {chat.template}{alone}", file=sys.stderr)
        if self._interactive:
            words = ", ".join(f"{word} {does}" for word, does in WORDS.items())
            print(f"{words}, Ctrl-C ends a reply", file=sys.stderr)
        for line in self._lines():
            if line == "/quit":
                break
            try:
                exchanges += self._answered(line, first=not exchanges)
            except KeyboardInterrupt:
                # before the model began, or between two models
                if not self._interactive:
                    raise
                print(f"({CUT})", file=sys.stderr)
        return exchanges

    def _answered(self, line: str, *, first: bool) -> list[dict[str, Any]]:
        """Do what a line says; the exchange that it was, if it was one."""
        if line == "/reset":
            for chat in self._chats:
                chat.reset()
        elif line.startswith("/") and line[1:].isalpha():
            self._refuse(f"{line} is no command{did_you_mean(line, WORDS)}; there are {', '.join(WORDS)}")
        elif line:
            return [{"prompt": line, "replies": [*self._replies(line, first=first)]}]
        return []

    def _replies(self, prompt: str, *, first: bool) -> Iterator[dict[str, Any]]:
        headed = len(self._chats) > 1
        for number, chat in enumerate(self._chats):
            if headed:
                self._write("" if first and not number else "\n", f"[{chat.name}]\n")
            try:
                reply = chat.reply(prompt, lambda text: self._write(text))
            except PissaError as error:
                self._refuse(str(error))
                continue
            self._write("\n")
            if reply.end == "interrupted" and not self._interactive:
                raise KeyboardInterrupt
            if reply.end != "stop":
                why = f"cut at {reply.tokens} tokens; --max-new-tokens" if reply.end == "length" else CUT
                print(f"({for_terminal(chat.name)}: {why})", file=sys.stderr)
            yield {"from": chat.name, **reply._asdict()}

    def _refuse(self, message: str) -> None:
        """Say what is wrong; on a terminal the chat goes on."""
        if not self._interactive:
            raise DataError(message)
        complain(message)

    def _write(self, *texts: str) -> None:
        if self._out is not None:
            print(*map(for_terminal, texts), sep="", end="", file=self._out, flush=True)

    def _lines(self) -> Iterator[str]:
        """What the user types, or the lines of a pipe, without blanks around them."""
        if not self._interactive:
            for number, line in enumerate(sys.stdin.buffer, 1):
                try:
                    yield line.decode("utf-8").strip()
                except UnicodeDecodeError as error:
                    raise DataError(f"line {number} of standard input is no UTF-8 text") from error
            return
        with suppress(ImportError):
            import readline  # noqa: F401 -- input() edits lines and recalls earlier ones with it
        both = sys.stdout.isatty() and self._out is sys.stdout
        while True:
            try:
                if not both:
                    print("> ", end="", file=sys.stderr, flush=True)
                typed = input("> " if both else "")
            except EOFError:
                print(file=sys.stderr)
                return
            except KeyboardInterrupt:
                print("\n/quit or Ctrl-D leaves", file=sys.stderr)
                continue
            # what is typed in another encoding arrives as lone surrogates
            yield typed.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
