"""The limits' program compiles here and measures what can be believed; a machine without an instruction says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from loadtest.limits import FLAGS, MEASURES, SOURCE, as_text, l3_bytes, main, run
from model.native.build import find_compiler


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("limits") / "limits"
    subprocess.run([find_compiler(), *FLAGS, "-Wall", "-Wextra", "-Werror", str(SOURCE), "-o", str(path)], check=True)
    return path


def test_a_cache_is_read_at_a_rate_that_can_be_believed(program: Path) -> None:
    rate = run(program, "read", "8", "1")
    assert rate is not None
    assert 1e9 < rate < 1e13


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    ("what", "flag"), [("bf16_flops", "avx512_bf16"), ("fp32_flops", "fma"), ("int8_ops", "avx512_vnni")]
)
def test_operations_are_many_where_the_processor_has_the_instruction(program: Path, what: str, flag: str) -> None:
    rate = run(program, *MEASURES[what], "1")
    if flag in Path("/proc/cpuinfo").read_text().split():
        assert rate is not None and 1e8 < rate < 1e14
    else:
        assert rate is None


def test_an_instruction_that_is_not_known_has_no_rate(program: Path) -> None:
    assert run(program, "int3", "1") is None


def test_the_cache_has_a_size_or_none() -> None:
    assert (l3_bytes() or 2**20) >= 2**20


def test_limits_read_as_text() -> None:
    assert as_text({"bf16_flops": 4.5e11, "int8_ops": None}) == "bf16_flops 450.0 G, int8_ops none"


def test_no_threads_are_refused() -> None:
    with pytest.raises(SystemExit) as end:
        main(["--threads", "0"])
    assert end.value.code == 2
