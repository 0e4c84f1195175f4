"""The engine process with the fake runner.

FAKE_LOAD=mistake makes it refuse to load; FAKE_CRASH names a token that kills it.
"""

import os
import sys
import time

from model.interface import Batch, ModelFacts, Runner
from service.config import Settings
from service.engine.process import main
from tests.engine.fake_runner import SHAPE, FakeRunner

FACTS = ModelFacts(
    architecture="FakeForCausalLM",
    digest="sha256:0",
    dtype="float32",
    context_length=SHAPE.context_length,
    vocab_size=SHAPE.vocab_size,
    eos_token_ids=(0,),
    num_parameters=1,
    weight_bytes=4,
    kv_bytes_per_token=8,
    quantization="none",
    backend="none",
    cpu_level="",
    num_threads=1,
)
STEP_SECONDS = 0.002


def take_a_while(batch: Batch) -> None:
    time.sleep(STEP_SECONDS)
    crash = int(os.environ.get("FAKE_CRASH", "-1"))
    if any(row.admission is not None and crash in row.admission.token_ids for row in batch.rows):
        raise RuntimeError("as asked")


def load(settings: Settings) -> tuple[Runner, ModelFacts]:
    if os.environ.get("FAKE_LOAD") == "mistake":
        raise ValueError("no such model")
    return FakeRunner(on_step=take_a_while), FACTS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load))
