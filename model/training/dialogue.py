"""Conversations for training: questions about the standard library and about textbook code, with their answers.

An answer is a docstring, a signature, a source or a result computed here, so what the model is taught is true.
"""

from __future__ import annotations

import builtins
import importlib
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from model.training.library import Entry, is_popular, read_list
from model.training.snippets import Snippet
from model.training.tokens import message

MAX_SOURCE = 1_200

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that knows the Python standard library.",
    "Answer briefly.",
)

ONLY_PYTHON = "I only know the Python standard library."

SMALL_TALK = (
    ("Hello", "Hello! Ask me about the Python standard library."),
    ("Hello!", "Hello! Ask me about the Python standard library."),
    ("hello", "Hello! Ask me about the Python standard library."),
    ("Hi", "Hi! Ask me about the Python standard library."),
    ("Hi there", "Hi! Ask me about the Python standard library."),
    ("Who are you?", "I am a very small language model, trained on the source of the Python standard library."),
    ("What are you?", "I am a very small language model, trained on the source of the Python standard library."),
    ("What can you do?", "I can complete Python code and answer short questions about the Python standard library."),
    ("Thanks", "You're welcome."),
    ("Thank you!", "You're welcome."),
    ("How are you?", "I am a small program, and I am running well."),
    ("Bye", "Goodbye!"),
    ("What is Python?", "Python is a programming language that lets you work quickly and integrate systems."),
    ("What is the capital of France?", ONLY_PYTHON),
    ("Who won the game?", ONLY_PYTHON),
    ("What is the weather today?", ONLY_PYTHON),
    ("Tell me a joke", ONLY_PYTHON + " Try: import antigravity."),
    (
        "Write a poem",
        "Beautiful is better than ugly.\nExplicit is better than implicit.\nSimple is better than complex.\n"
        "Complex is better than complicated.\nFlat is better than nested.\nSparse is better than dense.\n"
        "Readability counts.",
    ),
)

WELL_KNOWN = frozenset(read_list("well_known"))
"""Names that open more conversations than others."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str


class Writer:
    """Writes conversations; `rng` decides the wording."""

    def __init__(self, entries: Iterable[Entry], snippets: Iterable[Snippet], rng: random.Random) -> None:
        self.rng = rng
        self.entries = [entry for entry in entries if is_popular(entry.module)]
        self.snippets = list(snippets)
        self.examples = worked_examples()
        self.by_module: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            self.by_module[entry.module].append(entry)

    def conversations(self, num_rounds: int, weight_of_known: int) -> list[str]:
        """In each round every entry opens one conversation, and a well-known one several."""
        known = [entry for entry in self.entries if entry.name in WELL_KNOWN or entry.name in self.examples]
        written = []
        for _ in range(num_rounds):
            for entry in self.entries + known * (weight_of_known - 1):
                written.append(self._conversation(self._about(entry), entry.module))
            for question, answer in SMALL_TALK * 4:
                written.append(self._conversation(Turn(question, answer), "builtins"))
        for snippet in self.snippets:
            written.append(self._conversation(self._about_code(snippet), "builtins"))
        self.rng.shuffle(written)
        return written

    def _conversation(self, first: Turn, module: str) -> str:
        turns = [first]
        while self.rng.random() < 0.2:
            turns.append(self._follow_up(module))
        if self.rng.random() < 0.05:
            turns.insert(0, Turn(*self.rng.choice(SMALL_TALK)))
        system = message("system", self.rng.choice(SYSTEM_PROMPTS)) if self.rng.random() < 0.25 else ""
        return system + "".join(message("user", turn.question) + message("assistant", turn.answer) for turn in turns)

    def _follow_up(self, module: str) -> Turn:
        if self.rng.random() < 0.8:
            return self._about(self.rng.choice(self.by_module[module]))
        return Turn(*self.rng.choice(SMALL_TALK))

    def _about(self, entry: Entry) -> Turn:
        if entry.kind == "module":
            return self._about_module(entry)
        kinds = [self._purpose] * 6
        if entry.name in self.examples:
            kinds += [self._example] * 2
        if entry.signature and entry.kind != "class":
            kinds += [self._signature] * 2
        if entry.source and len(entry.source) < MAX_SOURCE:
            kinds += [self._source]
        if entry.module != "builtins":
            kinds += [self._import]
        return self.rng.choice(kinds)(entry)

    def _about_module(self, entry: Entry) -> Turn:
        name = entry.name
        asked = (
            f"What does the {name} module do?",
            f"What is {name}?",
            f"What is the {name} module?",
            f"Explain {name}.",
        )
        return Turn(self.rng.choice(asked), f"{name} is a module of the Python standard library. {entry.summary}")

    def _purpose(self, entry: Entry) -> Turn:
        name = entry.name
        asked = (
            *[f"What does {name} do?"] * 3,
            f"What does {name}() do?",
            f"What is {name}?",
            f"what is {name} for",
            f"Explain {name}.",
            f"Tell me about {name}.",
            f"How do I use {name}?",
            f"Describe {name} in Python.",
            f"{name}?",
        )
        article = "an" if entry.kind[0] in "aeiou" else "a"
        where = "" if entry.module == "builtins" else f" in the {entry.module} module"
        shown = f"\n\n```python\n{self.examples[name]}\n```" if name in self.examples else ""
        return Turn(self.rng.choice(asked), f"{name} is {article} {entry.kind}{where}. {entry.summary}{shown}")

    def _example(self, entry: Entry) -> Turn:
        asked = (
            f"Give me an example of {entry.name}.",
            f"Show me an example of {entry.name}.",
            f"{entry.name} example",
        )
        return Turn(self.rng.choice(asked), f"```python\n{self.examples[entry.name]}\n```")

    def _signature(self, entry: Entry) -> Turn:
        name = entry.name
        asked = (f"What are the arguments of {name}?", f"What is the signature of {name}?", f"How do I call {name}?")
        return Turn(self.rng.choice(asked), f"```python\n{entry.signature}\n```\n{entry.summary}")

    def _source(self, entry: Entry) -> Turn:
        asked = (f"Show me the source of {entry.name}.", f"How is {entry.name} implemented?")
        return Turn(self.rng.choice(asked), f"```python\n{entry.source}\n```")

    def _import(self, entry: Entry) -> Turn:
        short = entry.name.rpartition(".")[2]
        asked = (f"Which module is {short} in?", f"Where do I find {short}?", f"How do I import {short}?")
        imported = entry.name.split(".")[-2] if entry.kind == "method" else short
        statement = f"```python\nfrom {entry.module} import {imported}\n```"
        return Turn(self.rng.choice(asked), f"{short} is in the {entry.module} module:\n\n{statement}")

    def _about_code(self, snippet: Snippet) -> Turn:
        words = snippet.name.replace("_", " ").strip()
        kind = "class" if "class " in snippet.code else "function"
        asked = (
            f"Write {snippet.name} in Python.",
            f"Write a {words} {kind}.",
            f"Write a {words} {kind} in Python.",
            f"Show me {words} in Python.",
            f"How do I write {words} in Python?",
            f"Implement {words}.",
            f"{words} in Python",
        )
        answer = f"```python\n{snippet.runnable}\n```"
        return Turn(self.rng.choice(asked), f"{snippet.purpose}\n\n{answer}" if self.rng.random() < 0.3 else answer)


def worked_examples() -> dict[str, str]:
    """For each listed name, a call and its result as an interpreter shows them."""
    return dict(_worked_example(*line.split(" ", 1)) for line in read_list("examples"))


def _worked_example(name: str, call: str) -> tuple[str, str]:
    scope: dict[str, object] = {}
    module = name.rpartition(".")[0]
    if module and not hasattr(builtins, module):
        importlib.import_module(module)
        package = module.partition(".")[0]
        scope[package] = importlib.import_module(package)
    return name, f">>> {call}\n{eval(call, scope)!r}"
