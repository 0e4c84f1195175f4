"""What a front end would know: gathers reports, and holds them to their promises."""

from dataclasses import dataclass, field

from model.interface import Sampling, TokenLogprobs
from service.engine.engine import Engine
from service.engine.messages import NO_TOKEN, FinishCode, Limits, Report, Start, Submit

FAR = 1e9


def make_submit(
    sequence_id: int,
    prompt: list[int],
    max_new: int = 8,
    *,
    seed: int = 0,
    min_new: int = 0,
    end: tuple[int, ...] = (),
    deadline: float = FAR,
    arrival: float = 0.0,
    priority: int = 0,
    cache_root: bytes | None = None,
    num_logprobs: int = -1,
    wants_each_token: bool = False,
) -> Submit:
    limits = Limits(max_new, min_new, end, deadline, arrival, priority)
    sampling = Sampling(seed=seed, num_logprobs=num_logprobs)
    return Submit(sequence_id, prompt, len(prompt), sampling, limits, cache_root, wants_each_token)


@dataclass
class Ledger:
    """Tokens and ends by sequence, over all reports; asserts that nothing follows an end."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    finishes: dict[int, FinishCode] = field(default_factory=dict)
    preemptions: dict[int, int] = field(default_factory=dict)
    logprobs: dict[int, list[TokenLogprobs | None]] = field(default_factory=dict)
    starts: dict[int, Start] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    """Ids in the order of their first token."""
    num_sampled: int = 0
    num_dropped: int = 0
    num_computed: int = 0
    num_preempted: int = 0
    num_recomputed: int = 0

    def take(self, report: Report) -> None:
        for start in report.starts:
            assert start.id not in self.starts, "started twice"
            self.starts[start.id] = start
        logprobs = report.logprobs or [None] * len(report.ids)
        columns = zip(report.ids, report.token_ids, report.finishes, report.preemptions, logprobs, strict=True)
        for sequence_id, token_id, finish, preemptions, logprob in columns:
            self._take_one(sequence_id, token_id, FinishCode(finish), preemptions, logprob)
        stats = report.stats
        self.num_sampled += stats.num_sampled
        self.num_dropped += stats.dropped_tokens
        self.num_computed += stats.num_tokens
        self.num_preempted += stats.num_preemptions
        self.num_recomputed += stats.recomputed_tokens

    def _take_one(
        self, sequence_id: int, token_id: int, finish: FinishCode, preemptions: int, logprobs: TokenLogprobs | None
    ) -> None:
        assert sequence_id not in self.finishes, "an event after the end"
        if token_id != NO_TOKEN:
            assert sequence_id in self.starts, "a token before the start"
            if sequence_id not in self.tokens:
                self.order.append(sequence_id)
            self.tokens.setdefault(sequence_id, []).append(token_id)
            self.logprobs.setdefault(sequence_id, []).append(logprobs)
        if finish is not FinishCode.NONE:
            self.finishes[sequence_id] = finish
            self.preemptions[sequence_id] = preemptions

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))


def step(engine: Engine, ledger: Ledger) -> Report | None:
    """One step, with every invariant checked after it."""
    report = engine.step()
    engine.scheduler.check()
    if report is not None:
        ledger.take(report)
    return report


def run_to_end(engine: Engine, ledger: Ledger, max_steps: int = 5000) -> int:
    """Steps until nothing is left; returns how many it took."""
    num_steps = 0
    while engine.has_work:
        assert num_steps < max_steps, "no end in sight"
        step(engine, ledger)
        num_steps += 1
    return num_steps
