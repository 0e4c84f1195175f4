"""Measure trained weights, by loss and by greedy answers: `python -m model.training.evaluate DATA FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.training import weights
from model.training.network import Network
from model.training.streams import Batch, Stream, read_streams
from model.training.tokens import START, STOP_IDS, message

NUM_POSITIONS = 512
ROWS_PER_STREAM = 64
ROWS_AT_ONCE = 8

COMPLETIONS = (
    "def binary_search(",
    "def fibonacci(n):",
    "class Stack:",
    "import argparse\n\n\ndef main():",
    "def quicksort(",
    "class Config:\n    def __init__(self, path):",
)
QUESTIONS = (
    "Hello",
    "What does os.path.join do?",
    "What does json.loads do?",
    "How do I use heapq.heappush?",
    "What is itertools.chain?",
    "Write a function that reverses a string.",
    "Show me the source of bisect.bisect_left.",
    "What is the capital of France?",
)


def main() -> None:
    """Read the arguments and print the measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder that model.training.corpus wrote")
    parser.add_argument("weights", type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("--samples", action="store_true", help="print greedy answers too")
    parser.add_argument("--max-new", type=int, default=120, help="tokens of each answer")
    arguments = parser.parse_args()
    network = weights.load(arguments.weights).eval()
    print(describe(losses(network, read_streams(arguments.data, NUM_POSITIONS))))
    if arguments.samples:
        tokenizer = Tokenizer.from_file(str(arguments.weights / "tokenizer.json"))
        asked = [message("user", question) + f"{START}assistant\n" for question in QUESTIONS]
        for prompt in (*COMPLETIONS, *asked):
            print(f"\n===== {prompt!r}\n{complete(network, tokenizer, prompt, arguments.max_new)}")


@torch.no_grad()
def losses(network: Network, streams: dict[str, Stream], max_rows: int = ROWS_PER_STREAM) -> dict[str, float]:
    """Nats per token on the first rows of every stream."""
    measured = {}
    for name, stream in streams.items():
        windows = stream.consecutive(max_rows, NUM_POSITIONS)
        parts = [windows[start : start + ROWS_AT_ONCE] for start in range(0, len(windows), ROWS_AT_ONCE)]
        with torch.autocast("cpu", torch.bfloat16):
            sums = [float(network.loss(*Batch.of_windows(part))) * len(part) for part in parts]
        measured[name] = sum(sums) / len(windows)
    return measured


def describe(measured: dict[str, float]) -> str:
    """The losses on one line."""
    return "  ".join(f"{name} {loss:.3f}" for name, loss in measured.items())


@torch.no_grad()
def complete(network: Network, tokenizer: Tokenizer, prompt: str, max_new: int) -> str:
    """The greedy continuation of a prompt, computed anew for each token."""
    ids = tokenizer.encode(prompt).ids
    num_prompt = len(ids)
    for _ in range(max_new):
        next_id = int(network(torch.tensor([ids]))[0, -1].argmax())
        if next_id in STOP_IDS:
            break
        ids.append(next_id)
    text: str = tokenizer.decode(ids[num_prompt:], skip_special_tokens=False)
    return text


if __name__ == "__main__":
    main()
