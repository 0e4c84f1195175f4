"""All settings of a server, resolved once at the edge: flags, then environment, then a TOML file, then defaults.

The only module that reads the environment. Everything past it gets frozen values.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.interface import MAX_THREADS
from service.errors import StartupError

BUILT_IN_MODEL = Path(__file__).resolve().parent.parent / "model" / "default"
ENV_PREFIX = "QUIRE_"


class Settings(BaseModel):
    """Settings of `quire serve`. Each field is a flag (--like-this), a variable (QUIRE_LIKE_THIS) and a TOML key."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    model: Path = BUILT_IN_MODEL
    """Hugging Face directory to serve; default: the built-in model."""
    model_name: str = Field("", max_length=128)
    """Name callers use; default: the directory's name, "quire-default" for the built-in model."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback also needs insecure."""
    port: int = Field(50051, ge=0, le=65535)
    """gRPC port; 0 takes a free one."""
    insecure: bool = False
    """Allow plain text on an address that others can reach."""
    metrics_host: str = "127.0.0.1"
    """Address of the Prometheus endpoint /metrics."""
    metrics_port: int = Field(9464, ge=0, le=65535)
    """Port of the Prometheus endpoint; 0 takes a free one."""
    reflection: bool = True
    """Offer gRPC server reflection."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision; auto is the checkpoint's own (bfloat16 for float16 checkpoints)."""
    quantize: Literal["none", "int8"] = "none"
    """Keep the weights of matrices as they are, or as 8-bit codes, multiplied with activations in 8 bits."""
    backend: Literal["auto", "gpu", "native", "torch"] = "auto"
    """What computes: an NVIDIA card, the kernels compiled for the CPU, or torch, slowly; auto is the first there is."""
    cpu_level: Literal["auto", "v4_amx", "v4_bf16", "v4_vnni", "v4", "v3", "baseline"] = "auto"
    """Instruction set of the kernels; auto is this CPU's best one. Machines at one level use the same kernels."""
    threads: int | None = Field(None, ge=1, le=MAX_THREADS)
    """Compute threads; default: the CPUs this process may use, one less where there are four or more."""
    pin_threads: Literal["auto", "on", "off"] = "auto"
    """Tie compute threads to CPUs; auto does where there are four or more, no quota, and threads is not set."""
    context_length: int | None = Field(None, ge=2)
    """Shorten the model's context, in tokens."""
    block_size: int | None = Field(None, ge=16, le=256, multiple_of=16)
    """Tokens per block of the key/value cache, a multiple of 16; default: 16, on a card 64."""
    kv_cache_mib: int | None = Field(None, ge=1)
    """Size of the key/value pool in MiB; default: 256, on a card all that is free."""
    num_blocks: int | None = Field(None, ge=1)
    """Size of the key/value pool in blocks; overrides kv_cache_mib."""
    prefix_cache: bool = True
    """Reuse the keys and values of common prefixes."""
    graphs: bool = True
    """On a card, replay steps as CUDA graphs instead of launching their kernels one by one."""
    gpu_attention: Literal["triton", "flash-attention-3"] = "triton"
    """On a card, what computes attention: our kernels, or FlashAttention-3, with last bits that depend on the load."""
    max_num_seqs: int = Field(64, ge=1, le=4096)
    """Sequences that run at the same time."""
    max_batch_tokens: int = Field(512, ge=1, le=65536)
    """Tokens computed in one step at most."""
    target_itl_ms: float = Field(50.0, gt=0)
    """Prefill chunks shrink so that running streams wait about this long between tokens."""

    max_waiting_requests: int = Field(256, ge=0)
    """Requests beyond those that can run at the same time; more are refused."""
    max_waiting_tokens: int = Field(262_144, ge=1)
    """Prompt tokens that may wait; more are refused."""
    default_deadline_seconds: float = Field(600.0, gt=0)
    """Deadline of calls that bring none."""
    max_deadline_seconds: float = Field(3600.0, gt=0)
    """Longest deadline; longer ones are shortened to it."""
    reader_stall_seconds: float = Field(30.0, gt=0)
    """A reader that takes nothing for this long is ended."""
    lame_duck_seconds: float = Field(1.0, ge=0)
    """Time between NOT_SERVING and refusing, for balancers to notice."""
    drain_seconds: float = Field(30.0, ge=0)
    """Time that running requests have to finish at shutdown."""

    engine_timeout_seconds: float = Field(10.0, gt=0)
    """An engine silent for this long is restarted."""
    max_engine_restarts: int = Field(3, ge=0)
    """Restarts allowed within five minutes; one more failure ends the server."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """Form of log lines; auto is text on a terminal, else JSON."""

    @model_validator(mode="after")
    def _check_together(self) -> Settings:
        if not is_loopback(self.host) and not self.insecure:
            raise ValueError(f"host: {self.host} can be reached by others in plain text; pass --insecure to allow it")
        if self.max_num_seqs > self.max_batch_tokens:
            raise ValueError("max_num_seqs: must not be larger than max_batch_tokens: each takes a token of every step")
        if self.default_deadline_seconds > self.max_deadline_seconds:
            raise ValueError("default_deadline_seconds: must not be larger than max_deadline_seconds")
        return self

    @property
    def served_name(self) -> str:
        """The name callers use for the model."""
        if self.model_name:
            return self.model_name
        return "quire-default" if self.model == BUILT_IN_MODEL else self.model.resolve().name


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host in ("localhost", "::1", "[::1]") or host.startswith("127.")


def default_address() -> str:
    """Where the command line looks for a server: QUIRE_ADDRESS, else this machine, at the port that a server takes."""
    port = os.environ.get(f"{ENV_PREFIX}PORT") or Settings.model_fields["port"].default
    return os.environ.get(f"{ENV_PREFIX}ADDRESS") or f"localhost:{port}"


def load_settings(flags: Mapping[str, Any], file: Path | None = None) -> Settings:
    """Resolves flags over environment over file over defaults. Raises StartupError naming each bad field."""
    from_file = _read_toml(file) if file else {}
    return _validated({**from_file, **_environment(), **flags})


def check_setting(name: str, value: Any) -> None:
    """Holds a value to a setting's rule, for commands that take one of a server's. Raises StartupError."""
    _validated({name: value})


def _validated(values: dict[str, Any]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise StartupError("; ".join(_describe(dict(item)) for item in error.errors())) from None


def let_waiting_threads_sleep() -> None:
    """Sets OpenMP's wait policy, unless the user did; takes effect if torch is not imported yet.

    Threads that spin at every barrier keep the core from whoever they wait for, once another process (our own front
    end, say) wants one: beside one busy process, steps of 2 ms were measured to take 500 ms, and 2 to 3 ms with this.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _environment() -> dict[str, Any]:
    """What the environment sets, unvalidated."""
    names = {ENV_PREFIX + name.upper(): name for name in Settings.model_fields}
    return {names[key]: value for key, value in os.environ.items() if key in names}


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            return {key.replace("-", "_"): value for key, value in tomllib.load(stream).items()}
    except OSError as error:
        raise StartupError(f"config file {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"config file {file}: {error}") from None


def _describe(item: dict[str, Any]) -> str:
    """One violation as 'field: what is wrong'."""
    place = ".".join(str(part) for part in item["loc"])
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "no such setting"
    return f"{place}: {message}" if place else message
