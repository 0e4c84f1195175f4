"""What the door refuses, and that it tells everything at once, whatever the numbers, names and sizes."""

import asyncio
import math
import threading
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import ResourceInfo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engine.guard import is_sound
from service.pb.quire.v1 import inference_pb2 as pb
from service.rpc import convert
from service.rpc.long_text import MAX_OPEN
from service.text.chat import PRIVATE_USE
from tests.rpc.conftest import failure_of, failure_of_stream
from tests.rpc.fake_engine import FakeEngine, hello
from tests.rpc.test_generate import spec

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = convert.SAMPLING_RANGES
HOSTILE_FLOATS = [math.nan, math.inf, -math.inf, -1e-9, -1.0, 3.4e38, -3.4e38]
BAD_FLOATS = {
    "temperature": [*HOSTILE_FLOATS, 100.01],
    "top_p": [*HOSTILE_FLOATS, 0.0, 1.01],
    "min_p": [*HOSTILE_FLOATS, 1.01],
    "repetition_penalty": [*HOSTILE_FLOATS, 0.0, 10.01],
    "presence_penalty": [math.nan, math.inf, -math.inf, 2.01, -2.01],
    "frequency_penalty": [math.nan, math.inf, -math.inf, 2.01, -2.01],
}


def test_the_contract_states_the_limits_that_the_door_enforces():
    contract = " ".join((ROOT / "proto/quire/v1/inference.proto").read_text().replace("//", " ").split())
    for stated in (
        f"At most {convert.MAX_LOGIT_BIAS:,} entries",
        f"1 to {convert.MAX_MESSAGES:,} messages",
        f"At most {convert.MAX_STOP_STRINGS}, each of 1 to {convert.MAX_STOP_STRING_CHARS} characters",
        f"At most {convert.MAX_STOP_TOKEN_IDS}, each in [0, vocab_size)",
        f"Range [0, {convert.MAX_TOP_LOGPROBS}]; 0 returns",
        f"At most {convert.MAX_SALT_BYTES} bytes of UTF-8",
        f"At most {convert.MAX_LABEL_CHARS} characters, printable",
        f"Divides the logits. 0 is greedy: the most likely token, no randomness. Range {SAMPLING['temperature']}",
        f"probabilities sum to at least this. Range {SAMPLING['top_p']}",
        f"as likely as the most likely one. Range {SAMPLING['min_p']}",
        f"every token in prompt or output. Range {SAMPLING['repetition_penalty']}",
        f"every token that the output already holds. Range {SAMPLING['presence_penalty']}",
        f"once per occurrence of the token in the output. Range {SAMPLING['frequency_penalty']}",
        f"What is added to its logit. Range {convert.BIAS}",
        f"then the earlier arrival. Range {convert.PRIORITY}",
    ):
        assert stated in contract, stated


async def refused(served, made: pb.GenerationSpec):
    """The failure, which must be the same for both methods."""
    unary = await failure_of(served.stub.Generate(pb.GenerateRequest(spec=made)))
    stream = await failure_of_stream(served.stub.StreamGenerate(pb.StreamGenerateRequest(spec=made)))
    assert (unary.code, unary.message, unary.details) == (stream.code, stream.message, stream.details)
    assert served.engine.submitted == []
    return unary


async def test_every_number_out_of_range_is_refused(serve):
    served = await serve()
    for name, values in BAD_FLOATS.items():
        for value in values:
            made = spec(1, sampling=pb.SamplingParams(**{name: value}))
            failure = await failure_of(served.stub.Generate(pb.GenerateRequest(spec=made)))
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
            assert list(failure.fields) == [f"spec.sampling.{name}"], (name, value)
    assert served.engine.submitted == []


BAD_SPECS = {
    "spec.sampling.top_k": pb.GenerationSpec(sampling=pb.SamplingParams(top_k=4097)),
    "spec.sampling.logit_bias": pb.GenerationSpec(
        sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=i) for i in range(1025)])
    ),
    "spec.sampling.logit_bias[1].token_id": pb.GenerationSpec(
        sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=3), pb.LogitBias(token_id=3)])
    ),
    "spec.sampling.logit_bias[0].token_id": pb.GenerationSpec(
        sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=2**32 - 1)])
    ),
    "spec.sampling.logit_bias[0].bias": pb.GenerationSpec(
        sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(token_id=3, bias=math.nan)])
    ),
    "spec.stop.max_tokens": pb.GenerationSpec(stop=pb.StopParams(max_tokens=0)),
    "spec.stop.min_tokens": pb.GenerationSpec(stop=pb.StopParams(max_tokens=5, min_tokens=6)),
    "spec.stop.stop_strings": pb.GenerationSpec(stop=pb.StopParams(stop_strings=["a"] * 17)),
    "spec.stop.stop_strings[1]": pb.GenerationSpec(stop=pb.StopParams(stop_strings=["a", ""])),
    "spec.stop.stop_strings[0]": pb.GenerationSpec(stop=pb.StopParams(stop_strings=["a" * 257])),
    "spec.stop.stop_token_ids": pb.GenerationSpec(stop=pb.StopParams(stop_token_ids=[1] * 65)),
    "spec.stop.stop_token_ids[0]": pb.GenerationSpec(stop=pb.StopParams(stop_token_ids=[4096])),
    "spec.output.top_logprobs": pb.GenerationSpec(output=pb.OutputOptions(top_logprobs=21)),
    "spec.output.omit_text": pb.GenerationSpec(
        output=pb.OutputOptions(omit_text=True), stop=pb.StopParams(stop_strings=["a"])
    ),
    "spec.cache.salt": pb.GenerationSpec(cache=pb.CacheOptions(salt="é" * 129)),
    "spec.priority": pb.GenerationSpec(priority=101),
    "spec.client_request_id": pb.GenerationSpec(client_request_id="a\nb"),
}


@pytest.mark.parametrize("field", BAD_SPECS)
async def test_each_field_is_checked(serve, field):
    served = await serve()
    made = spec()
    made.MergeFrom(BAD_SPECS[field])
    failure = await refused(served, made)
    assert failure.reason == "INVALID_FIELD"
    assert list(failure.fields) == [field]


BAD_PROMPTS = {
    "spec.prompt": pb.GenerationSpec(),
    "spec.text": pb.GenerationSpec(text=""),
    "spec.token_ids.ids": pb.GenerationSpec(token_ids=pb.TokenIds()),
    "spec.token_ids.ids[1]": pb.GenerationSpec(token_ids=pb.TokenIds(ids=[0, 4096])),
    "spec.chat.messages": pb.GenerationSpec(chat=pb.Chat()),
    "spec.chat.messages[0].role": pb.GenerationSpec(chat=pb.Chat(messages=[pb.ChatMessage(content="a")])),
}


@pytest.mark.parametrize("field", BAD_PROMPTS)
async def test_each_kind_of_prompt_is_checked(serve, field):
    failure = await refused(await serve(), BAD_PROMPTS[field])
    assert list(failure.fields) == [field]


async def test_an_unknown_enum_number_is_refused(serve):
    made = pb.GenerationSpec(chat=pb.Chat(messages=[pb.ChatMessage(role=99, content="a")]))
    failure = await refused(await serve(), made)
    assert list(failure.fields) == ["spec.chat.messages[0].role"]


async def test_a_missing_spec_is_refused(serve):
    served = await serve()
    failure = await failure_of(served.stub.Generate(pb.GenerateRequest()))
    assert list(failure.fields) == ["spec"]


async def test_all_violations_come_at_once(serve):
    made = pb.GenerationSpec(
        token_ids=pb.TokenIds(ids=[5000] * 500),
        sampling=pb.SamplingParams(**dict.fromkeys(BAD_FLOATS, math.nan), top_k=2**32 - 1),
        stop=pb.StopParams(max_tokens=0, min_tokens=9, stop_strings=[""] * 16, stop_token_ids=[2**32 - 1] * 64),
        output=pb.OutputOptions(top_logprobs=2**32 - 1, omit_text=True),
        cache=pb.CacheOptions(salt="x" * 10_000),
        priority=-(2**31),
        client_request_id="x" * 10_000,
    )
    made.sampling.logit_bias.extend([pb.LogitBias(token_id=2**32 - 1, bias=math.inf)] * 1024)
    failure = await refused(await serve(), made)
    told = {field.partition("[")[0] for field in failure.fields}
    assert told >= {f"spec.sampling.{name}" for name in (*BAD_FLOATS, "top_k", "logit_bias")}
    assert told >= {f"spec.stop.{name}" for name in ("max_tokens", "min_tokens", "stop_strings", "stop_token_ids")}
    assert told >= {"spec.output.top_logprobs", "spec.output.omit_text", "spec.cache.salt", "spec.priority"}
    assert told >= {"spec.client_request_id", "spec.token_ids.ids"}


async def test_bytes_that_are_no_message_and_text_that_is_no_utf8_are_refused(serve):
    served = await serve()
    for method in ("Generate", "Tokenize"):
        call = served.channel.unary_unary(f"/quire.v1.InferenceService/{method}")
        for raw in (b"\xff\xff\xff\xff", b"\x0a\x04\x12\x02\xff\xfe", b"\x12\x02\xff\xfe"):
            failure = await failure_of(call(raw))
            failure.check()
            assert failure.code is grpc.StatusCode.INVALID_ARGUMENT
            assert failure.reason == "INVALID_FIELD"
    stream = served.channel.unary_stream("/quire.v1.InferenceService/StreamGenerate")(b"\x0a\x04\x12\x02\xff\xfe")
    assert (await failure_of_stream(stream)).reason == "INVALID_FIELD"


async def test_an_unknown_model_is_not_found(serve):
    served = await serve()
    failure = await refused(served, spec(1, model="no such model"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert failure.one(ResourceInfo).resource_name == "no such model"
    for call in (
        served.stub.GetModel(pb.GetModelRequest(model="x" * 100_000)),
        served.stub.Tokenize(pb.TokenizeRequest(model="x", text="a")),
        served.stub.Detokenize(pb.DetokenizeRequest(model="x")),
    ):
        assert (await failure_of(call)).reason == "MODEL_NOT_FOUND"


async def test_more_than_the_context_is_refused(serve, tokenizer):
    served = await serve()
    num_prompt = len(tokenizer.encode("def f("))
    assert (await served.stub.Generate(pb.GenerateRequest(spec=spec(1024 - num_prompt)))).output.num_tokens > 0
    served.engine.submitted.clear()
    for made in (
        spec(1024 - num_prompt + 1),
        spec(2**32 - 1),
        pb.GenerationSpec(token_ids=pb.TokenIds(ids=[1] * 1024)),
        pb.GenerationSpec(token_ids=pb.TokenIds(ids=[9999] * 2000)),
    ):
        failure = await refused(served, made)
        assert (failure.code, failure.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH_EXCEEDED")
        assert failure.metadata["limit"] == "1024"


async def test_a_text_of_ten_megabytes_is_refused_without_tokenising(serve, tokenizer, monkeypatch):
    served = await serve()
    monkeypatch.setattr(type(tokenizer), "encode", None)
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="a" * 10_000_000)])
    for call in (
        served.stub.Generate(pb.GenerateRequest(spec=spec(1, text="a" * 10_000_000))),
        served.stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(chat=chat))),
        served.stub.Tokenize(pb.TokenizeRequest(text="a" * 10_000_000)),
        served.stub.Tokenize(pb.TokenizeRequest(chat=chat)),
    ):
        failure = await failure_of(call)
        assert failure.reason == "CONTEXT_LENGTH_EXCEEDED"
        assert int(failure.metadata["promptTokens"]) * tokenizer.max_token_bytes >= 10_000_000


async def test_a_long_text_is_tokenised_beside_the_event_loop(serve, tokenizer):
    served = await serve(FakeEngine(greeting=hello(context_length=100_000, num_blocks=10_000)))
    text = "word " * 10_000
    answer = await served.stub.Generate(pb.GenerateRequest(spec=spec(1, text=text)))
    assert answer.started.prompt_tokens == len(tokenizer.encode(text))


async def test_long_texts_wait_in_a_bounded_queue_that_holds_up_no_prompt(serve, tokenizer, monkeypatch):
    served = await serve(FakeEngine(greeting=hello(context_length=100_000, num_blocks=10_000)))
    gate, encode = threading.Event(), type(tokenizer).encode

    def encode_when_told(self, text, *arguments, **options):
        if text.startswith("slow"):
            gate.wait(30)
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(type(tokenizer), "encode", encode_when_told)
    slow, num_refused = pb.TokenizeRequest(text="slow " * 5_000), 5
    calls = {asyncio.ensure_future(served.stub.Tokenize(slow)) for _ in range(MAX_OPEN + num_refused)}
    try:
        await served.until(lambda: sum(call.done() for call in calls) == num_refused)
        refused_calls = {call for call in calls if call.done()}
        for call in refused_calls:
            failure = await failure_of(call)
            assert (failure.reason, failure.metadata["queueDepth"]) == ("QUEUE_FULL", str(MAX_OPEN))
        assert (await served.stub.Tokenize(pb.TokenizeRequest(text="short"))).token_ids
        prompt = pb.GenerateRequest(spec=spec(1, text="word " * 5_000))
        assert (await served.stub.Generate(prompt)).output.num_tokens == 1
    finally:
        gate.set()
    assert all(len(answer.token_ids) > 4_000 for answer in await asyncio.gather(*(calls - refused_calls)))


async def test_what_can_never_fit_the_pool_is_refused(serve, tokenizer):
    served = await serve(FakeEngine(greeting=hello(num_blocks=2)))
    failure = await refused(served, spec(100))
    needed = -(-(len(tokenizer.encode("def f(")) + 100) // 16)
    assert failure.reason == "EXCEEDS_KV_CAPACITY"
    assert failure.metadata == {"blocksNeeded": str(needed), "blocksTotal": "2"}


async def test_min_tokens_must_fit_what_is_left(serve):
    served = await serve(FakeEngine(greeting=hello(default_max_tokens=5)))
    failure = await refused(served, spec(stop=pb.StopParams(min_tokens=6)))
    assert list(failure.fields) == ["spec.stop.min_tokens"]


async def test_chat_without_a_template_is_a_feature_this_model_lacks(serve):
    served = await serve()
    served.front_end.model.chat = None
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="a")])
    failure = await refused(served, pb.GenerationSpec(chat=chat))
    assert (failure.code, failure.reason) == (grpc.StatusCode.UNIMPLEMENTED, "FEATURE_DISABLED")
    assert failure.metadata == {"feature": "chat"}


async def test_a_conversation_the_template_refuses(serve):
    from service.text.chat import ChatTemplate

    served = await serve()
    served.front_end.model.chat = ChatTemplate("{{ raise_exception('secret /etc/words') }}")
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="a")])
    failure = await refused(served, pb.GenerationSpec(chat=chat))
    assert list(failure.fields) == ["spec.chat.messages"]
    failure = await failure_of(served.stub.Tokenize(pb.TokenizeRequest(chat=chat)))
    assert list(failure.fields) == ["chat.messages"]


async def test_a_conversation_that_leaves_no_mark_is_refused_rather_than_never_answered(serve):
    served = await serve(FakeEngine(greeting=hello(context_length=100_000, num_blocks=10_000)))
    content = "".join(map(chr, PRIVATE_USE)) + "<|im_end|>"
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content=content)])
    failure = await failure_of(served.stub.Tokenize(pb.TokenizeRequest(chat=chat), timeout=30))
    assert list(failure.fields) == ["chat.messages"]


async def test_tokenize_and_detokenize_are_checked(serve):
    served = await serve()
    assert list((await failure_of(served.stub.Tokenize(pb.TokenizeRequest()))).fields) == ["input"]
    empty_chat = pb.TokenizeRequest(chat=pb.Chat())
    assert list((await failure_of(served.stub.Tokenize(empty_chat))).fields) == ["chat.messages"]
    too_large = pb.DetokenizeRequest(token_ids=[0, 4096])
    assert list((await failure_of(served.stub.Detokenize(too_large))).fields) == ["token_ids[1]"]
    too_many = pb.DetokenizeRequest(token_ids=[0] * 1025)
    assert list((await failure_of(served.stub.Detokenize(too_many))).fields) == ["token_ids"]


# Mostly what is accepted, or nearly nothing would be.
NUMBERS = st.integers(0, 40).flatmap(
    lambda n: st.floats(width=32) if n == 0 else st.sampled_from([None, 1.0, 0.5, 2.0**-149])
)
COUNTS = st.integers(0, 20).flatmap(lambda n: st.integers(0, 2**32 - 1) if n == 0 else st.sampled_from([None, 1, 9]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    floats=st.fixed_dictionaries(dict.fromkeys(BAD_FLOATS, NUMBERS)),
    counts=st.fixed_dictionaries(dict.fromkeys(("top_k", "max_tokens", "min_tokens", "top_logprobs"), COUNTS)),
    stop_ids=st.lists(st.integers(0, 4200), max_size=3),
    prompt=st.one_of(st.text(max_size=40), st.lists(st.integers(0, 4200), max_size=8)),
)
def test_what_is_accepted_is_sound_for_the_engine(tokenizer, floats, counts, stop_ids, prompt):
    """Whatever the numbers: either a QuireError, or a submission that the engine's own guard accepts."""
    import asyncio

    from service.errors import QuireError
    from service.rpc.convert import Converter
    from service.rpc.model import ServedModel

    def given_only(values):
        return {name: value for name, value in values.items() if value is not None}

    sizes = given_only(counts)
    made = pb.GenerationSpec(
        sampling=pb.SamplingParams(**given_only(floats), **{k: v for k, v in sizes.items() if k == "top_k"}),
        stop=pb.StopParams(
            **{k: v for k, v in sizes.items() if k in ("max_tokens", "min_tokens")}, stop_token_ids=stop_ids
        ),
        output=pb.OutputOptions(**{k: v for k, v in sizes.items() if k == "top_logprobs"}),
    )
    if isinstance(prompt, str):
        made.text = prompt
    else:
        made.token_ids.ids.extend(prompt)
    model = ServedModel("m", tokenizer, None)
    greeting = hello()
    model.learn(greeting)
    converter = Converter(model, default_deadline_seconds=1.0, max_deadline_seconds=1.0)
    try:
        request = asyncio.run(converter.generation(pb.GenerateRequest(spec=made), 0.0, None))
    except QuireError:
        return
    assert is_sound(request.to_submit(1), greeting.shape)
