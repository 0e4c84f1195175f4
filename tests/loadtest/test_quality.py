"""Quality is measured right: of the model's own distribution, position by position, against the same windows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from loadtest.quality import (
    ANSWER_TOKENS,
    Measured,
    Scores,
    answer,
    common_prefix,
    compare,
    main,
    options_of,
    parse,
    perplexity,
    score,
)
from model.interface import Admission, Batch, Dtype, Runner, RunnerShape, Sampled, TokenLogprobs
from model.runner import load_runner
from service.config import BUILT_IN_MODEL

VOCAB_SIZE = 10


class CountingRunner:
    """Its model says 0.9 to the last token plus one and shares the rest out; checks what it is asked."""

    shape = RunnerShape(
        num_blocks=12, block_size=4, num_slots=2, context_length=24, vocab_size=VOCAB_SIZE, max_batch_tokens=64
    )

    def __init__(self) -> None:
        self.known: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.admissions: dict[int, Admission] = {}

    def launch(self, batch: Batch) -> CountingRunner:
        drawn, told = [], []
        for row in batch.rows:
            if row.admission is not None:
                assert len(row.new_block_ids) * self.shape.block_size >= row.start + row.num_tokens
                self.admissions[row.slot] = row.admission
                kept = self.known.get(row.slot, [])[: row.start]
                assert list(row.admission.token_ids[: row.start]) == kept, "the blocks hold this prefix"
                self.known[row.slot] = list(row.admission.token_ids)
            assert row.wants_token and row.start + row.num_tokens == len(self.known[row.slot])
            favourite = (self.known[row.slot][-1] + 1) % VOCAB_SIZE
            bias = self.admissions[row.slot].sampling.logit_bias
            drawn.append(bias[0][0] if bias else favourite)
            chosen = 0.9 if drawn[-1] == favourite else 0.1 / (VOCAB_SIZE - 1)
            told.append(TokenLogprobs(math.log(chosen), [favourite], [math.log(0.9)]))
            self.known[row.slot].append(drawn[-1])
        self.sampled = Sampled(drawn, [True] * len(drawn), told)
        return self

    def result(self) -> Sampled:
        return self.sampled


def test_every_token_but_the_first_is_scored_by_the_model_itself() -> None:
    found = score(CountingRunner(), [(1, 2, 3, 3), (5, 6, 8, 9), (9, 0, 1, 2)])
    sure, unsure = math.log(0.9), math.log(0.1 / 9)
    assert [window.logprobs for window in found] == [
        pytest.approx([sure, sure, unsure]),
        pytest.approx([sure, unsure, sure]),
        pytest.approx([sure] * 3),
    ]
    assert [window.greedy_ids for window in found] == [[2, 3, 4], [6, 7, 9], [0, 1, 2]]
    assert perplexity(found) == pytest.approx(math.exp(-(7 * sure + 2 * unsure) / 9))


def test_answers_follow_their_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.quality.ANSWER_TOKENS", 4)
    assert answer(CountingRunner(), [(3, 1), (2,), (9,)]) == [[2, 3, 4, 5], [3, 4, 5, 6], [0, 1, 2, 3]]


def test_a_comparison_pairs_windows_and_answers() -> None:
    baseline = Measured([Scores([-1.0, -2.0], [1, 2]), Scores([-3.0, -3.0], [3, 4])], [[1, 2, 3], [4, 5, 6]])
    other = Measured([Scores([-1.1, -2.1], [1, 2]), Scores([-3.3, -3.3], [3, 9])], [[1, 2, 3], [4, 9, 6]])
    found = compare(baseline, other)
    assert found.perplexity_change_percent == pytest.approx(100 * (math.exp(0.2) - 1))
    assert found.standard_error_percent == pytest.approx(100 * math.exp(0.2) * 0.1)
    assert found.greedy_agreement == 0.75
    assert (found.same_answers, found.mean_common_prefix) == (0.5, 2.0)


def test_one_window_has_no_standard_error() -> None:
    one = Measured([Scores([-1.0], [1])], [[1]])
    assert compare(one, one).standard_error_percent is None
    assert compare(one, one).perplexity_change_percent == 0


@pytest.mark.parametrize(("yours", "length"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([0], 0), ([1], 1), ([], 0)])
def test_a_common_prefix_ends_where_tokens_part(yours: list[int], length: int) -> None:
    assert common_prefix([1, 2, 3], yours) == length


def test_a_way_is_a_dtype_and_perhaps_a_quantization() -> None:
    assert options_of(BUILT_IN_MODEL, "float32").dtype is Dtype.FLOAT32
    for unknown in ("int8", "bfloat16+int1"):
        with pytest.raises(ValueError, match=r"int8|quant|int1"):
            options_of(BUILT_IN_MODEL, unknown)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--tokens", "0"])
    assert end.value.code == 2
    assert main(["--against", "float8"]) == 2
    assert main(["--model", "no/such/folder"]) == 2


@pytest.fixture(scope="module")
def runner() -> Runner:
    return load_runner(options_of(BUILT_IN_MODEL, "bfloat16"))[0]


def test_the_runner_would_choose_again_what_it_answered(runner: Runner, native_kernels: str) -> None:
    """Taught its own answer, it agrees with every token: a position is judged as it is computed in a generation."""
    prompts = [tuple(range(100, 112)), tuple(range(7, 19)), tuple(range(50, 62))]
    answers = answer(runner, prompts)
    taught = [(*prompt, *tokens) for prompt, tokens in zip(prompts, answers, strict=True)]
    for tokens, scores in zip(answers, score(runner, taught), strict=True):
        assert len(tokens) == ANSWER_TOKENS
        assert scores.greedy_ids[-ANSWER_TOKENS:] == tokens
        assert all(logprob <= 0 for logprob in scores.logprobs)


def test_a_real_run_compares_bfloat16_and_float32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tokens", "1000", "--against", "float32"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["text"]["tokens"] == 1022
    assert Path(document["quality"]) == BUILT_IN_MODEL
    assert 5 < document["ways"]["bfloat16"]["perplexity"] < 100
    found = document["against"]["float32"]
    assert abs(found["perplexity_change_percent"]) < 2
    assert 0.95 < found["greedy_agreement"] <= 1
