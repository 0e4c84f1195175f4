"""The engine process: settings on standard input, a socket for front ends, a heartbeat for the supervisor.

    python -m service.engine.process --socket PATH --heartbeat-fd N

The composition root of the engine, and the one place in the service that names the model's runner. Exit codes: 0 when
told to end or left alone, 2 for a user's mistake, 1 for a failure.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from model.interface import Backend, Dtype, GpuAttention, ModelFacts, Quantization, Runner, RunnerOptions, RunnerShape
from service import logs
from service.config import Settings, let_waiting_threads_sleep
from service.engine.engine import Engine, EngineOptions
from service.engine.heartbeat import Heartbeat
from service.engine.loop import EngineLoop
from service.engine.messages import Hello
from service.engine.progress import LoadProgress
from service.errors import StartupError

log = logging.getLogger("quire.engine")

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2

Load = Callable[[Settings], tuple[Runner, ModelFacts]]


def load_model(settings: Settings) -> tuple[Runner, ModelFacts]:
    """The runner that the settings ask for. Raises ValueError for a model or options that cannot be used."""
    let_waiting_threads_sleep()
    # Imported last: torch takes seconds, and a mistake in the arguments should not have to wait for it.
    from model.runner import load_runner

    progress = LoadProgress()
    try:
        return load_runner(runner_options(settings), progress)
    finally:
        progress.stop()


def runner_options(settings: Settings) -> RunnerOptions:
    """What the settings mean to a runner. Raises ValueError for a model directory that cannot be read."""
    from model.config import load_config

    is_auto = settings.dtype == "auto"
    return RunnerOptions(
        model_dir=str(settings.model),
        dtype=load_config(Path(settings.model)).dtype if is_auto else Dtype(settings.dtype),
        quantization=Quantization(settings.quantize),
        backend=Backend(settings.backend),
        cpu_level=None if settings.cpu_level == "auto" else settings.cpu_level,
        block_size=settings.block_size,
        kv_cache_bytes=None if settings.kv_cache_mib is None else settings.kv_cache_mib * 2**20,
        num_blocks=settings.num_blocks,
        max_num_seqs=settings.max_num_seqs,
        max_batch_tokens=settings.max_batch_tokens,
        context_length=settings.context_length,
        num_threads=settings.threads,
        pins_threads=None if settings.pin_threads == "auto" else settings.pin_threads == "on",
        captures_graphs=settings.graphs,
        gpu_attention=GpuAttention(settings.gpu_attention),
    )


def engine_options(settings: Settings, shape: RunnerShape) -> EngineOptions:
    """What the settings mean to the loop over a runner of this shape."""
    return EngineOptions(
        depth=1 if shape.runs_ahead else 0,
        prefix_cache=settings.prefix_cache,
        target_itl_seconds=settings.target_itl_ms / 1000,
    )


def main(arguments: Sequence[str], load: Load = load_model) -> int:
    """Loads and serves. Returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the supervisor's to handle
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    parser = argparse.ArgumentParser(prog="quire-engine")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--heartbeat-fd", type=int, required=True)
    options = parser.parse_args(arguments)
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    logs.configure(settings.log_level, settings.log_format)
    try:
        runner, facts = load(settings)
    except (ValueError, StartupError) as error:
        print(f"quire: error: {error}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    engine = Engine(runner, engine_options(settings, runner.shape))
    # What was loaded stays: collections that walk it would only pause steps.
    gc.collect()
    gc.freeze()
    return _serve(EngineLoop(engine, Hello(facts, runner.shape), options.socket, Heartbeat(options.heartbeat_fd)))


def _serve(loop: EngineLoop) -> int:
    try:
        loop.run()
    except Exception:
        # A step that failed leaves slots and blocks in doubt: a new process and resubmission are the cure.
        log.exception("the engine failed")
        return EXIT_FAILURE
    finally:
        loop.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
