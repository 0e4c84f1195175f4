"""The walls between rooms, read from the syntax trees: who may import what."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PB = "service/pb/"


def sources(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if not name_of(path).startswith(PB))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def importers(module: str, *folders: str) -> set[str]:
    """Files that import a module or something in it."""
    return {
        name_of(path)
        for path in sources(*folders)
        if any(name == module or name.startswith(module + ".") for name in imports_of(path))
    }


def outside(names: set[str], *allowed: str) -> set[str]:
    return {name for name in names if not name.startswith(allowed)}


def test_torch_lives_in_model_only():
    """But for the benches that give single kernels of a card their tensors, and the peer that is made of it."""
    found = importers("torch", "model", "service", "loadtest")
    assert found, "the reader finds imports"
    assert not outside(found, "model/", "loadtest/gpu/", "loadtest/peers/transformers.py")
    assert not found & {"model/interface.py", "model/config.py", "model/info.py"}


def test_triton_lives_with_the_kernels_for_a_card():
    found = importers("triton", "model", "service", "loadtest")
    assert "model/gpu/check.py" in found
    assert not outside(found, "model/gpu/")


def test_kernels_for_a_card_know_tensors_and_the_model():
    """Nor does the service know them: a runner is all that it names."""
    for path in sources("model/gpu"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots <= {"model", "numpy", "torch", "triton", *sys.stdlib_module_names}, f"{name_of(path)}: {roots}"
    assert not importers("model.gpu", "service")


@pytest.mark.parametrize("file", ["check", "parts", "processes", "records", "summary", "works"])
def test_the_check_of_a_card_needs_nothing_that_may_be_missing_there(file):
    roots = {name.split(".")[0] for name in imports_of(ROOT / "loadtest/gpu" / f"{file}.py")}
    assert roots <= {"loadtest", *sys.stdlib_module_names}


def test_the_check_of_a_card_starts_without_torch():
    assert not modules_after("import loadtest.gpu.check") & {"torch", "triton", "numpy", "psutil", "grpc", "pydantic"}


def test_grpc_lives_at_the_door_and_in_the_client():
    found = importers("grpc", "model", "service")
    found |= importers("grpc_health", "model", "service") | importers("grpc_reflection", "model", "service")
    assert "service/rpc/listener.py" in found
    assert not outside(found, "service/rpc/", "service/server.py", "service/client/")


def test_only_the_composition_root_knows_the_door():
    assert not outside(importers("service.rpc", "model", "service", "loadtest"), "service/rpc/", "service/server.py")
    assert importers("service.server", "model", "service", "loadtest") == set()


def test_the_client_knows_no_server():
    """Nor does the server use the client."""
    for path in sources("service/client"):
        ours = {name for name in imports_of(path) if name.startswith(("service.", "model"))}
        assert all(name.startswith(("service.client", "service.pb")) for name in ours), f"{name_of(path)}: {ours}"
    users = importers("service.client", "model", "service")
    assert not outside(users, "service/client/", "service/cli/")


def test_stubs_are_used_at_the_door_and_in_the_client():
    assert not outside(importers("service.pb", "model", "service"), "service/rpc/", "service/client/")


def test_prometheus_lives_in_one_file():
    assert importers("prometheus_client", "model", "service") == {"service/metrics.py"}


def test_pydantic_stays_with_the_settings():
    """The command line makes flags of the settings' fields, whose type is pydantic's."""
    assert importers("pydantic", "model", "service") <= {"service/config.py", "service/cli/serve.py"}


def test_the_model_knows_no_service():
    assert not importers("service", "model")


def test_the_service_knows_the_models_interface_only():
    """But for the engine's process, which names the runner, and the command line, which describes checkpoints."""
    for path in sources("service"):
        named = {name for name in imports_of(path) if name.split(".")[0] == "model"}
        allowed = {
            "service/engine/process.py": ("model.interface", "model.config", "model.runner"),
        }.get(name_of(path), ("model.interface",))
        if name_of(path).startswith("service/cli/"):
            allowed = ("model.interface", "model.info", "model.cards", "model.config")
        assert all(name == "model" or name.startswith(allowed) for name in named), f"{name_of(path)}: {named}"


def test_the_engine_keeps_to_itself():
    for path in sources("service/engine"):
        allowed = {"numpy", "msgspec", "model", "service", *sys.stdlib_module_names}
        if name_of(path) in ("service/engine/process.py", "service/engine/progress.py"):
            allowed.add("rich")
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots <= allowed, f"{name_of(path)}: {roots - allowed}"
        ours = {name for name in imports_of(path) if name.startswith("service.")}
        known = ("service.engine",)
        if name_of(path) == "service/engine/process.py":
            known += ("service.config", "service.errors", "service.logs")
        assert all(name.startswith(known) for name in ours), f"{name_of(path)}: {ours}"


@pytest.mark.parametrize(
    "file",
    [*(f"model/{name}.py" for name in ("interface", "config", "info", "cards")), "model/native/limits.py"],
)
def test_light_modules_use_the_standard_library_only(file):
    roots = {name.split(".")[0] for name in imports_of(ROOT / file)}
    assert roots <= {"model", *sys.stdlib_module_names}


def test_the_environment_is_read_in_one_file():
    for path in sources("model", "service"):
        reads = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
        ]
        assert not reads or name_of(path) == "service/config.py", name_of(path)


@pytest.mark.parametrize("module", ["pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml"])
def test_nothing_that_executes_what_it_reads(module):
    assert not importers(module, "model", "service")


def test_packages_import_nothing():
    for path in [*ROOT.glob("model/**/__init__.py"), *ROOT.glob("service/**/__init__.py")]:
        assert path.read_text() == "", name_of(path)


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json\nprint(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=60)
    return set(json.loads(done.stdout))


def test_the_front_end_loads_no_torch():
    loaded = modules_after("import service.server")
    assert "grpc.aio" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "rich"}


def test_the_supervisor_loads_neither_torch_nor_grpc():
    assert not modules_after("import service.supervisor") & {"torch", "grpc", "numpy"}


def test_importing_a_type_loads_no_torch():
    assert not modules_after("import model.interface, service.engine.messages") & {"torch", "grpc"}
