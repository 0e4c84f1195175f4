"""The stubs in service/pb are what the generator makes of proto/ today."""

import importlib.resources
from pathlib import Path

import pytest

grpc_tools = pytest.importorskip("grpc_tools")

ROOT = Path(__file__).resolve().parent.parent


def test_stubs_are_in_sync(tmp_path, monkeypatch):
    from grpc_tools import protoc

    monkeypatch.chdir(ROOT)
    sources = sorted(Path("proto").rglob("*.proto"))
    assert sources
    include = importlib.resources.files("grpc_tools") / "_proto"
    arguments = ["-Iservice/pb=proto", f"-I{include}"]
    arguments += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    mapped = [f"service/pb/{source.relative_to('proto')}" for source in sources]
    assert protoc.main(["protoc", *arguments, *mapped]) == 0
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.py*") if path.is_file()}
    kept = {
        path.relative_to(ROOT): path.read_text()
        for path in (ROOT / "service" / "pb").rglob("*_pb2*.py*")
        if path.suffix in (".py", ".pyi")
    }
    assert set(made) == set(kept)
    for path, text in made.items():
        assert text == kept[path], f"{path} is not what the generator makes: run it again"


def test_proto_holds_protos_only():
    """An import package called proto would collide with proto-plus."""
    assert {path.suffix for path in (ROOT / "proto").rglob("*") if path.is_file()} == {".proto"}
