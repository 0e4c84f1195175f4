"""The check of compiled kernels: what passes it, and that each kind of fault fails it.

What compiles is a process of its own, since kernels in this one are interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from model.gpu import check
from model.gpu.variant import Variant

ROOT = Path(__file__).resolve().parents[2]
FAULTS = {
    "crash": "exit code 3",
    "more values than registers": "bytes of stack",
    "too few rows for a warp group": "no wgmma",
    "no power of two": "power of 2",
    "argument without a type": "a_ptr, b_ptr have types",
    "aligned constant": "aligned names more",
}


def run(cache: Path, *modules: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "model.gpu.check", *modules],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_sound_kernels_pass_and_each_unsound_one_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "tests.gpu.examples.sound", "tests.gpu.examples.unsound")
    assert done.returncode == 1, done.stderr
    *_, last = done.stdout.splitlines()
    verdicts = {verdict["name"]: verdict for verdict in json.loads(last)["variants"]}

    sound = {name: verdict for name, verdict in verdicts.items() if name not in FAULTS}
    assert {name: verdict["has_wgmma"] for name, verdict in sound.items()} == {
        "product of 64 rows": True,
        "product of 16 rows": False,
        "row of 1024": False,
    }
    for verdict in sound.values():
        assert (verdict["faults"], verdict["stack_bytes"]) == ([], 0)
        assert 8 <= verdict["num_registers"] <= 255
        assert verdict["seconds"] > 0
    assert verdicts["product of 64 rows"]["shared_bytes"] >= 2 * 64 * 64 * 2, "both operands are in shared memory"

    assert sorted(json.loads(last)["failed"]) == sorted(FAULTS)
    for name, fault in FAULTS.items():
        assert fault in " ".join(verdicts[name]["faults"]), verdicts[name]
        assert f"FAILED {name}: " in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("[")]) == len(verdicts)
    assert f"[{len(verdicts)}/{len(verdicts)}] " in done.stdout

    again = run(tmp_path, "tests.gpu.examples.sound")
    assert again.returncode == 0, again.stderr
    document = json.loads(again.stdout.splitlines()[-1])
    assert (document["target"], document["failed"]) == ("sm_90", [])
    assert {v["name"]: v["num_registers"] for v in document["variants"]} == {
        name: verdict["num_registers"] for name, verdict in sound.items()
    }


def test_interpreted_kernels_are_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as ended:
        check.main([])
    assert ended.value.code == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_module_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"model\.gpu\.nowhere"):
        check.gather(["model.gpu.nowhere"])


@pytest.mark.parametrize(
    ("names", "message"), [([], "kernels has no variants"), (["a", "b", "a"], "more than one variant: a$")]
)
def test_a_module_says_what_it_has_once(names: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("kernels")
    module.variants = lambda: [Variant(name, None, {}, {}) for name in names]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", module)
    with pytest.raises(ValueError, match=message):
        check.gather(["kernels"])


def test_no_module_of_kernels_is_left_out() -> None:
    files = (ROOT / "model/gpu").rglob("*.py")
    having = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files if _has_variants(path)}
    assert having <= set(check.MODULES)


def _has_variants(path: Path) -> bool:
    return any(line.startswith("def variants(") for line in path.read_text().splitlines())
