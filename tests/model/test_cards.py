"""What is told of cards without torch."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from model import cards


def test_cards_are_those_that_the_driver_shows(tmp_path: Path) -> None:
    assert cards.cards(tmp_path / "none") == []
    for place, name in (("0000:01:00.0", "NVIDIA H200"), ("0000:02:00.0", "NVIDIA A100: 80 GB")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 16\n")
    assert cards.cards(tmp_path) == ["NVIDIA H200", "NVIDIA A100: 80 GB"]


@pytest.mark.parametrize(
    ("version", "finds_triton", "fault"),
    [
        ("2.13.0+cpu", True, "torch 2.13.0+cpu is not built for NVIDIA cards"),
        ("2.13.0+cpu.cxx11.abi", True, "torch 2.13.0+cpu.cxx11.abi is not built for NVIDIA cards"),
        ("2.13.0+rocm6.4", True, "torch 2.13.0+rocm6.4 is not built for NVIDIA cards"),
        (None, True, "torch is not installed"),
        ("2.13.0+cu130", False, "triton, which compiles the kernels for a card, is not installed"),
        ("2.13.0+cu130", True, None),
        ("2.13.0", True, None),
    ],
)
def test_what_is_installed_tells_whether_a_card_can_be_used(
    monkeypatch: pytest.MonkeyPatch, version: str | None, finds_triton: bool, fault: str | None
) -> None:
    def version_of(name: str) -> str:
        if version is None:
            raise PackageNotFoundError(name)
        return version

    monkeypatch.setattr(cards, "version", version_of)
    monkeypatch.setattr(cards, "find_spec", lambda name: finds_triton or None)
    monkeypatch.setattr(cards.shutil, "which", lambda name: f"/bin/{name}")
    assert cards.find_install_fault() == fault
    monkeypatch.setattr(cards.shutil, "which", lambda name: None)
    expected = "triton needs a C compiler, and there is none of gcc, clang" if fault is None else fault
    assert cards.find_install_fault() == expected
