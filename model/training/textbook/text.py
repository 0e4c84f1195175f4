"""Text and files, as textbooks show them. Training material: read as text, and tested by being importable."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def is_palindrome(text: str) -> bool:
    """Return True if the text reads the same in both directions."""
    letters = [letter.lower() for letter in text if letter.isalnum()]
    return letters == letters[::-1]


def reverse_string(text: str) -> str:
    """Return the text backwards."""
    return text[::-1]


def count_words(text: str) -> dict[str, int]:
    """Return how often each word occurs in the text."""
    counts: dict[str, int] = {}
    for word in text.lower().split():
        counts[word] = counts.get(word, 0) + 1
    return counts


def most_common_words(text: str, count: int) -> list[tuple[str, int]]:
    """Return the most common words of the text, with their counts."""
    return Counter(text.lower().split()).most_common(count)


def count_vowels(text: str) -> int:
    """Return the number of vowels in the text."""
    return sum(1 for letter in text.lower() if letter in "aeiou")


def is_anagram(first: str, second: str) -> bool:
    """Return True if the two words have the same letters."""
    return sorted(first.lower()) == sorted(second.lower())


def caesar_cipher(text: str, shift: int) -> str:
    """Shift every letter of the text by a number of places in the alphabet."""
    result = []
    for letter in text:
        if letter.isalpha():
            base = ord("A") if letter.isupper() else ord("a")
            letter = chr((ord(letter) - base + shift) % 26 + base)
        result.append(letter)
    return "".join(result)


def capitalize_words(text: str) -> str:
    """Capitalize each word of the text."""
    return " ".join(word.capitalize() for word in text.split())


def hamming_distance(first: str, second: str) -> int:
    """Return the number of positions at which two strings of equal length differ."""
    return sum(a != b for a, b in zip(first, second, strict=True))


def edit_distance(first: str, second: str) -> int:
    """Return the least number of edits that turn one string into the other."""
    previous = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        current = [i]
        for j, b in enumerate(second, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (a != b)))
        previous = current
    return previous[-1]


def read_file(path: str) -> str:
    """Return the contents of a text file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def write_file(path: str, text: str) -> None:
    """Write text to a file."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def read_lines(path: str) -> list[str]:
    """Return the lines of a text file without their line endings."""
    with open(path, encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def count_lines(path: str) -> int:
    """Return the number of lines of a text file."""
    with open(path, encoding="utf-8") as file:
        return sum(1 for _ in file)


def load_json(path: str) -> Any:
    """Load a JSON document from a file."""
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def save_json(path: str, data: Any) -> None:
    """Save data to a file as a JSON document."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file, indent=2)


def read_csv(path: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file as dictionaries."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def list_files(folder: str, suffix: str) -> list[str]:
    """Return the names of the files in a folder that end with a suffix."""
    return sorted(name for name in os.listdir(folder) if name.endswith(suffix))


def find_files(folder: str, pattern: str) -> list[Path]:
    """Return the paths below a folder that match a pattern."""
    return sorted(Path(folder).rglob(pattern))


def file_size(path: str) -> int:
    """Return the size of a file in bytes."""
    return os.path.getsize(path)


def hello(name: str) -> None:
    """Print a greeting."""
    print(f"Hello, {name}!")


def main() -> int:
    """Print the arguments of the command line."""
    for argument in sys.argv[1:]:
        print(argument)
    return 0
