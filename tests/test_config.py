"""Settings: flags over environment over file over defaults; every mistake named, in one line."""

from pathlib import Path

import pytest

from service.config import Settings, load_settings
from service.errors import StartupError


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "quire.toml"
    file.write_text("port = 1\nmax_num_seqs = 2\nblock-size = 32\n")
    monkeypatch.setenv("QUIRE_PORT", "4")
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "5")
    settings = load_settings({"port": 6}, file)
    assert (settings.port, settings.max_num_seqs, settings.block_size) == (6, 5, 32)
    assert settings.max_batch_tokens == Settings().max_batch_tokens


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 70_000}, "port"),
        ({"port": "many"}, "port"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": 24}, "block_size"),
        ({"target_itl_ms": float("nan")}, "target_itl_ms"),
        ({"drain_seconds": float("inf")}, "drain_seconds"),
        ({"backend": "magic"}, "backend"),
        ({"no_such": 1}, "no_such"),
        ({"host": "0.0.0.0"}, "insecure"),
        ({"max_num_seqs": 65, "max_batch_tokens": 64}, "max_num_seqs"),
        ({"default_deadline_seconds": 9.0, "max_deadline_seconds": 1.0}, "default_deadline_seconds"),
    ],
)
def test_a_bad_value_is_named_in_one_line(flags: dict[str, object], named: str) -> None:
    with pytest.raises(StartupError) as caught:
        load_settings(flags)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_violations_are_told_at_once() -> None:
    with pytest.raises(StartupError, match=r"(?s)port.*block_size"):
        load_settings({"port": -1, "block_size": -1})


def test_a_file_with_mistakes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "quire.toml"
    file.write_text("port = = 1")
    with pytest.raises(StartupError, match="config file"):
        load_settings({}, file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="config file"):
        load_settings({}, file)
    with pytest.raises(StartupError, match="No such file"):
        load_settings({}, tmp_path / "missing.toml")


def test_others_can_reach_the_server_only_when_asked_for() -> None:
    assert load_settings({"host": "0.0.0.0", "insecure": True}).host == "0.0.0.0"
    assert load_settings({"host": "127.0.0.2"}).insecure is False
