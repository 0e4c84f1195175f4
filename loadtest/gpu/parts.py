"""The parts of a check of a card, in the order of their worth: what each runs, for how long, and what it needs.

Standard library only. It does not know how a part is run, nor what its figures mean.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

MODEL_MODULES = ("torch", "numpy", "triton", "safetensors", "tokenizers")
ENGINE_MODULES = (*MODEL_MODULES, "grpc", "grpc_health", "google.protobuf", "msgspec", "psutil", "pydantic")
"""The engine in a process of its own, with the client that loadtest.targets brings along."""
SERVER_MODULES = (
    *ENGINE_MODULES,
    *("google.rpc", "grpc_reflection", "jinja2", "prometheus_client", "rich", "uvloop"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One process."""

    name: str
    limit_seconds: float
    module: str
    """Run as python -m; one of loadtest.gpu takes the options of `parse_part`."""
    arguments: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("torch",)
    """Modules that must be there."""
    programs: tuple[str, ...] = ()
    """Programs of which one must be there."""
    runs_dry: bool = True

    @property
    def takes_options(self) -> bool:
        """Whether its command line is `parse_part`'s."""
        return self.module.startswith("loadtest.gpu.")

    def missing(self) -> str | None:
        """What it needs and this machine lacks; None if nothing."""
        modules = [name for name in self.needs if not is_importable(name)]
        if modules:
            return f"Python here has no {', '.join(modules)}"
        if self.programs and not any(map(shutil.which, self.programs)):
            return f"there is none of {', '.join(self.programs)}"
        return None


def is_importable(module: str) -> bool:
    """Whether a module is there, without loading it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor is its package
        return False


def _of_model(name: str, model: str, limit_seconds: float, module: str, needs: Sequence[str]) -> Part:
    return Part(f"{name} {model}", limit_seconds, f"loadtest.gpu.{module}", ("--model", model), tuple(needs))


PARTS = (
    Part("limits", 25, "loadtest.gpu.limits"),
    Part("native", 40, "model.native.build", programs=("cc", "gcc", "clang"), runs_dry=False),
    Part("tests", 90, "loadtest.gpu.marked_tests", needs=("torch", "triton", "pytest")),
    Part("attention", 60, "loadtest.gpu.attention", needs=("torch", "triton")),
    Part("products", 80, "loadtest.gpu.products", needs=("torch", "triton")),
    Part("operators", 25, "loadtest.gpu.operators", needs=("torch", "triton")),
    Part("sampler", 30, "loadtest.gpu.sampler", needs=("torch", "triton")),
    Part("models", 60, "loadtest.gpu.models", needs=("numpy", "tokenizers")),
    _of_model("steps", "8B", 70, "steps", MODEL_MODULES),
    _of_model("steps", "1B", 40, "steps", MODEL_MODULES),
    _of_model("logits", "1B", 25, "logits", MODEL_MODULES),
    _of_model("engine", "8B", 80, "engine", ENGINE_MODULES),
    _of_model("engine", "1B", 60, "engine", ENGINE_MODULES),
    _of_model("transformers", "8B", 60, "transformers_peer", (*MODEL_MODULES, "transformers")),
    _of_model("grpc", "8B", 75, "server", SERVER_MODULES),
    _of_model("transformers", "1B", 40, "transformers_peer", (*MODEL_MODULES, "transformers")),
    _of_model("grpc", "1B", 60, "server", SERVER_MODULES),
    _of_model("logits", "8B", 60, "logits", MODEL_MODULES),
    Part("tiles", 60, "loadtest.gpu.tiles", needs=("torch", "triton")),
)
