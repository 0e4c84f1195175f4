"""Transformers as a peer: as many tokens as were asked for, and the figures that the other runners give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from loadtest.peers import transformers
from loadtest.peers.runner import parse
from loadtest.peers.transformers import generate, load, main, static_batches
from loadtest.peers.works import mixed_works
from loadtest.workloads import Work

MODEL = Path(__file__).resolve().parents[2] / "model" / "default"
W2 = ["--workload", "W2", "--batch", "2"]


def command_line(*arguments: str) -> list[str]:
    """With this process' threads, so that other tests keep theirs."""
    return ["--model", str(MODEL), "--threads", str(torch.get_num_threads()), *arguments]


def test_a_batch_gives_each_request_its_tokens_as_if_it_were_alone() -> None:
    job = parse("transformers", transformers.best_settings, command_line(*W2, "--precision", "fp32"))
    model = load(job)
    works = [Work(work.prompt, 4 + 3 * index) for index, work in enumerate(mixed_works(3, 3, 4096))]
    together = generate(model, works)
    assert [len(token_ids) for token_ids in together] == [4, 7, 10]
    assert together == [generate(model, [work])[0] for work in works]


def test_batches_are_of_answers_of_about_one_length() -> None:
    works = [Work((1,), num_new) for num_new in (9, 2, 5, 1, 8)]
    assert [[work.num_new for work in part] for part in static_batches(works, 2)] == [[1, 2], [5, 8], [9]]


@pytest.mark.parametrize(
    "arguments",
    [["--workload", "W1"], W2, ["--workload", "W3", "--batch", "3"], [*W2, "--set", "way=continuous"]],
    ids=" ".join,
)
def test_a_runner_ends_with_its_figures(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command_line(*arguments)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {"output_tokens_per_second"}
    if arguments == ["--workload", "W1"]:
        expected |= {"ms_per_token", "prefill_tokens_per_second"}
    assert found["figures"].keys() == expected
    assert all(value > 0 for value in found["figures"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*W2, "--precision", "int8"], "bf16 and fp32"),
        (["--workload", "W5"], "W1, W2 and W3"),
        (["--workload", "W1", "--set", "way=continuous"], "way is"),
        ([*W2, "--set", "way=some"], "way is"),
    ],
    ids=str,
)
def test_what_it_does_not_offer_is_refused_in_a_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(command_line(*arguments))
