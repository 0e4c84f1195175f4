"""What serving takes: measured on a real server, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadtest import footprint
from loadtest.footprint import main
from model.info import load_info
from model.interface import Dtype


def document_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, float]]:
    assert main(arguments) == 0
    found: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.e2e
def test_a_first_answer_and_memory_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--rounds", "1", "--streams", "24", "--pool-mib", "2", "--out", str(tmp_path)]
    found = document_of(capsys, *small, "--skip", "neighbour")
    assert 0 < found["first_answer_seconds"]["median"] < 60
    memory = found["memory_mib/bf16"]
    parts = memory["engine"] + memory["front end"] - memory["weights"] - memory["pool"]
    assert memory["beyond"] == pytest.approx(parts)
    assert 1.8 <= memory["pool"] <= 2 and memory["weights"] > 5
    assert memory["engine's peak"] >= memory["engine"] > memory["weights"] + memory["pool"]


def test_by_itself_it_fills_the_pool_of_the_built_in_model() -> None:
    plan = footprint.parse([])
    block_bytes = 16 * load_info(plan.model).config.kv_bytes_per_token(Dtype.BFLOAT16)
    num_tokens = footprint.PROMPT_TOKENS + footprint.NEW_TOKENS
    assert plan.num_streams * (num_tokens // 16) > plan.pool_mib * footprint.MIB // block_bytes


@pytest.mark.e2e
def test_a_pool_that_was_not_filled_is_no_measurement(tmp_path: Path) -> None:
    few = ["--rounds", "1", "--streams", "1", "--pool-mib", "64", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="of the pool: take more of them"):
        main([*few, "--skip", "neighbour", "first-answer"])


def test_a_ratio_is_of_speeds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    figures = iter(
        [
            {"ms_per_token": 4.0, "prefill_tokens_per_second": 100.0},
            {"ms_per_token": 8.0, "prefill_tokens_per_second": 60.0},
        ]
        * 2
    )
    monkeypatch.setattr(footprint, "run_work", lambda *_: next(figures))
    found = document_of(capsys, "--rounds", "1", "--skip", "first-answer", "memory")
    assert found["beside_another/bf16/W1 at 1, ms_per_token"]["median"] == 0.5
    assert found["beside_another/bf16/W2 at 8, prefill_tokens_per_second"]["median"] == 0.6


@pytest.mark.parametrize("given", [["--rounds", "0"], ["--skip", "everything"], ["--precisions", "int3"]])
def test_mistakes_are_refused(given: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
