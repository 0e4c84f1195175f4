"""Train the default model on the streams that `corpus` wrote: `python -m model.training.train DATA OUT --minutes 80`.

It owns the loop: the optimisers, the schedule and the clock. A run ends by itself; what it has learned so far lies in
OUT.partial, in the final format, at any time after the first few minutes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

from model.training import weights
from model.training.evaluate import describe, losses
from model.training.network import Network, Shape
from model.training.streams import Batch, Stream, read_streams, sample_batch

WEIGHT_DECAY = 0.1
MAX_GRADIENT_NORM = 1.0
NUM_WARMUP_STEPS = 100
FLOOR_OF_RATE = 0.01
STEPS_PER_REPORT = 50
ROWS_PER_CHECK = 16
"""Rows of each stream behind the losses of a checkpoint; the last report takes more."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train."""

    minutes: float
    max_steps: int
    num_rows: int
    num_positions: int
    learning_rate: float
    checkpoint_minutes: float

    def progress(self, step: int, elapsed_seconds: float) -> float:
        """The part of the run that is over: by the clock or by the count of steps, whichever is further."""
        return max(step / self.max_steps, elapsed_seconds / (60 * self.minutes))

    def rate(self, step: int, progress: float) -> float:
        """A short warm-up, then a straight line down to the floor."""
        warm = min(1.0, (step + 1) / NUM_WARMUP_STEPS)
        return self.learning_rate * max(FLOOR_OF_RATE, warm * (1.0 - progress))


def main() -> None:
    """Read the arguments, train, save."""
    arguments = _arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    shape = Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})
    plan = Plan(**{field.name: getattr(arguments, field.name) for field in fields(Plan)})
    network = Network(shape)
    print(f"{shape}\n{plan}\n{sum(weight.numel() for weight in network.parameters()):,} parameters", flush=True)
    trainer = Trainer(network, shape, plan, arguments.data, arguments.seed, arguments.compile)
    trainer.run(arguments.out.with_name(arguments.out.name + ".partial"))
    trainer.save(arguments.out)
    print("final", describe(losses(network, trainer.streams)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("data", type=Path, help="folder that model.training.corpus wrote")
    parser.add_argument("out", type=Path, help="folder for the trained weights")
    for field in fields(Shape):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=int, default=field.default, help="size of the network")
    parser.add_argument("--minutes", type=float, default=80.0, help="end after this long by the clock")
    parser.add_argument("--max-steps", type=int, default=100_000, help="end after this many steps")
    parser.add_argument("--num-rows", type=int, default=16, help="rows of a batch")
    parser.add_argument("--num-positions", type=int, default=512, help="tokens of a row")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="highest rate")
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0, help="between two checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and of the batches")
    parser.add_argument("--compile", action="store_true", help="compile the loss; needs a C++ compiler")
    return parser.parse_args()


class Trainer:
    """A network on its way through a plan; the one writer of its parameters."""

    def __init__(self, network: Network, shape: Shape, plan: Plan, data: Path, seed: int, compiled: bool) -> None:
        self.network, self.shape, self.plan = network, shape, plan
        self.tokenizer = data / "tokenizer.json"
        self.streams: dict[str, Stream] = read_streams(data, plan.num_positions)
        self.generator = torch.Generator().manual_seed(seed)
        self.loss = torch.compile(network.loss) if compiled else network.loss
        self.optimizers = optimizers_of(network)

    def run(self, partial: Path) -> None:
        """Step until the plan is over, with a checkpoint now and then."""
        started = saved = time.monotonic()
        step = num_tokens = 0
        while (progress := self.plan.progress(step, time.monotonic() - started)) < 1.0:
            batch = sample_batch(self.streams, self.plan.num_rows, self.plan.num_positions, self.generator)
            loss = self.step(batch, self.plan.rate(step, progress))
            num_tokens += batch.ids_BT.numel()
            if step % STEPS_PER_REPORT == 0:
                seconds = time.monotonic() - started
                print(f"step {step} loss {float(loss):.3f} {num_tokens / 1e6:.2f}M tokens {seconds:.0f}s", flush=True)
            if time.monotonic() - saved > 60 * self.plan.checkpoint_minutes:
                self.save(partial)
                print("checkpoint", describe(losses(self.network, self.streams, ROWS_PER_CHECK)), flush=True)
                saved = time.monotonic()
            step += 1
        print(f"trained {step} steps {num_tokens / 1e6:.2f}M tokens {time.monotonic() - started:.0f}s", flush=True)

    def step(self, batch: Batch, rate: float) -> Tensor:
        """One update of the parameters; a batch with a gradient that is not finite changes nothing."""
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = self.loss(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT_NORM)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            if torch.isfinite(norm):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def save(self, folder: Path) -> None:
        """Write the weights as they are now."""
        weights.save(self.network, self.shape, self.tokenizer, folder)


def optimizers_of(network: Network) -> list[Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices inside the layers, AdamW for the embedding and the norms."""
    embedding = network.model.embed_tokens.weight
    matrices = [weight for weight in network.parameters() if weight.dim() == 2 and weight is not embedding]
    scales = [weight for weight in network.parameters() if weight.dim() < 2]
    groups = [{"params": [embedding], "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    return [
        Muon(matrices, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        AdamW(groups, betas=(0.9, 0.95)),
    ]


if __name__ == "__main__":
    main()
