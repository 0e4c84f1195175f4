"""What a generation gives its caller, unary and streamed."""

import pytest

from service.engine.messages import FinishCode
from service.pb.quire.v1 import inference_pb2 as pb
from tests.rpc.conftest import TEXT
from tests.rpc.fake_engine import FakeEngine, hello


def spec(max_tokens: int | None = None, text: str = "def f(", **parts: object) -> pb.GenerationSpec:
    made = pb.GenerationSpec(text=text, **parts)
    if max_tokens is not None:
        made.stop.max_tokens = max_tokens
    return made


async def test_unary_gives_the_whole_result(serve, tokenizer):
    served = await serve()
    ids = tokenizer.encode(TEXT)
    made = spec(len(ids))
    made.output.return_token_ids = True
    made.sampling.seed = 7
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.output.text == TEXT
    assert list(answer.output.token_ids) == ids
    assert answer.output.num_tokens == len(ids)
    assert answer.started.seed == 7
    assert answer.started.model == "quire-default"
    assert answer.started.prompt_tokens == len(tokenizer.encode("def f("))
    assert answer.finished.reason == pb.FINISH_REASON_MAX_TOKENS
    assert not answer.finished.HasField("stop_match")
    assert answer.finished.usage.completion_tokens == len(ids)
    timing = answer.finished.timing
    assert 0 <= timing.queue.ToNanoseconds() <= timing.first_token.ToNanoseconds() <= timing.total.ToNanoseconds()


async def test_stream_begins_with_started_ends_with_finished_and_numbers_without_gaps(serve, tokenizer):
    served = await serve()
    num_tokens = len(tokenizer.encode(TEXT))
    messages = [m async for m in served.stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(num_tokens)))]
    assert [m.sequence_number for m in messages] == list(range(len(messages)))
    kinds = [m.WhichOneof("event") for m in messages]
    assert kinds == ["started", *["delta"] * (len(messages) - 2), "finished"]
    assert "".join(m.delta.text for m in messages) == TEXT
    assert sum(m.delta.num_tokens for m in messages) == num_tokens
    assert messages[-1].finished.usage.completion_tokens == num_tokens


async def test_nothing_is_sent_before_the_first_token(serve):
    served = await serve(FakeEngine(pause_at=0))
    call = served.stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(3)))
    await served.until(lambda: any(s.is_started for s in served.engine.sequences.values()))
    assert call.done() is False
    assert served.front_end.generations.num_open == 1
    served.engine.resume()
    assert (await call.read()).WhichOneof("event") == "started"


async def test_an_end_token_stops_and_is_not_text(serve, tokenizer):
    ids = tokenizer.encode("Hello")
    served = await serve(FakeEngine(script=[*ids, 2]))
    made = spec()
    made.output.return_token_ids = True
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.finished.reason == pb.FINISH_REASON_STOP
    assert answer.finished.stop_match.token_id == 2
    assert answer.output.text == "Hello"
    assert list(answer.output.token_ids) == [*ids, 2]
    assert answer.finished.usage.completion_tokens == len(ids) + 1


async def test_a_stop_token_of_the_callers_is_not_text_either(serve, tokenizer):
    ids = tokenizer.encode(TEXT)
    served = await serve()
    made = spec()
    made.stop.stop_token_ids.append(ids[3])
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.finished.stop_match.token_id == ids[3]
    assert answer.output.text == tokenizer.decode(ids[:3])


async def test_ignore_eos_and_keep_special_tokens(serve, tokenizer):
    eos = tokenizer.encode("<|im_end|>")
    assert len(eos) == 1
    served = await serve(FakeEngine(script=[*tokenizer.encode("a"), *eos], greeting=hello(eos_token_ids=(eos[0],))))
    made = spec(4)
    made.stop.ignore_eos = True
    made.output.keep_special_tokens = True
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.output.text == "a<|im_end|>a<|im_end|>"
    assert answer.finished.reason == pb.FINISH_REASON_MAX_TOKENS


@pytest.mark.parametrize(("include", "expected"), [(False, "Hello world, this is a "), (True, TEXT[:27])])
async def test_a_stop_string_ends_the_sequence_in_the_engine(serve, include, expected):
    served = await serve()
    made = spec()
    made.stop.stop_strings.extend(["list", "never"])
    made.stop.include_stop_string = include
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.output.text == expected
    assert answer.finished.stop_match.stop_string == "list"
    await served.idle()
    assert served.engine.cancelled == [served.engine.submitted[0].id]


@pytest.mark.parametrize("strings", [[], ["list"]])
async def test_the_engine_is_told_whether_each_token_is_wanted(serve, strings):
    served = await serve()
    made = spec(2)
    made.stop.stop_strings.extend(strings)
    await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert [submit.wants_each_token for submit in served.engine.submitted] == [bool(strings)]


async def test_a_stop_string_ends_the_sequence_though_nobody_reads(serve):
    served = await serve()
    made = spec()
    made.stop.stop_strings.append("list")
    served.stub.StreamGenerate(pb.StreamGenerateRequest(spec=made))
    await served.until(lambda: bool(served.engine.cancelled))


async def test_a_stop_string_counts_from_min_tokens_on(serve):
    served = await serve()
    made = spec()
    made.stop.stop_strings.append("world")
    made.stop.min_tokens = 12
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.output.text.startswith(TEXT)
    assert answer.finished.stop_match.stop_string == "world"


async def test_text_held_back_for_a_stop_string_is_let_go_at_the_end(serve, tokenizer):
    served = await serve(FakeEngine(script=tokenizer.encode("so long")))
    made = spec(len(tokenizer.encode("so long")))
    made.stop.stop_strings.append("longer")
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.output.text == "so long"


async def test_logprobs_come_one_per_token(serve):
    served = await serve()
    made = spec(3)
    made.output.top_logprobs = 2
    made.output.omit_text = True
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert len(answer.output.logprobs) == 3
    assert [entry.token_id for entry in answer.output.logprobs[0].top] == [0, 1]
    assert answer.output.logprobs[0].chosen.logprob == -0.5
    assert answer.output.text == ""


async def test_running_into_the_context_is_told_as_such(serve, tokenizer):
    served = await serve(FakeEngine(script=tokenizer.encode(TEXT), greeting=hello(context_length=20)))
    answer = await served.stub.Generate(pb.GenerateRequest(spec=spec()))
    assert answer.finished.reason == pb.FINISH_REASON_CONTEXT_LENGTH
    assert answer.finished.usage.completion_tokens == 20 - answer.started.prompt_tokens


async def test_without_max_tokens_a_small_pool_is_the_limit(serve, tokenizer):
    served = await serve(FakeEngine(script=tokenizer.encode(TEXT), greeting=hello(num_blocks=2)))
    answer = await served.stub.Generate(pb.GenerateRequest(spec=spec()))
    assert answer.finished.usage.completion_tokens == 32 - answer.started.prompt_tokens
    assert answer.finished.reason == pb.FINISH_REASON_CONTEXT_LENGTH


async def test_the_models_own_max_tokens_is_the_default(serve):
    served = await serve(FakeEngine(greeting=hello(default_max_tokens=5)))
    answer = await served.stub.Generate(pb.GenerateRequest(spec=spec()))
    assert answer.finished.usage.completion_tokens == 5
    assert answer.finished.reason == pb.FINISH_REASON_MAX_TOKENS


async def test_defaults_of_the_model_fill_what_is_unset(serve):
    greeting = hello(default_temperature=0.5, default_top_k=9, default_top_p=0.25, default_repetition_penalty=1.5)
    served = await serve(FakeEngine(greeting=greeting))
    made = spec(1)
    made.sampling.temperature = 0.0
    for each in (spec(1), made):
        await served.stub.Generate(pb.GenerateRequest(spec=each))
    unset, given = (submit.sampling for submit in served.engine.submitted)
    assert (unset.temperature, unset.top_k, unset.top_p, unset.repetition_penalty) == (0.5, 9, 0.25, 1.5)
    assert (given.temperature, given.top_k) == (0.0, 9)


async def test_a_seed_is_drawn_and_told(serve):
    served = await serve()
    answers = [await served.stub.Generate(pb.GenerateRequest(spec=spec(1))) for _ in range(2)]
    assert [submit.sampling.seed for submit in served.engine.submitted] == [a.started.seed for a in answers]
    assert answers[0].started.seed != answers[1].started.seed
    assert answers[0].started.generation_id != answers[1].started.generation_id


async def test_cached_tokens_preemptions_and_cache_options_pass_through(serve):
    served = await serve(FakeEngine(num_cached=2, preemptions=3))
    salted, bypassed = spec(1), spec(1, priority=-7)
    salted.cache.salt = "tenant"
    bypassed.cache.bypass = True
    answer = await served.stub.Generate(pb.GenerateRequest(spec=salted))
    await served.stub.Generate(pb.GenerateRequest(spec=bypassed))
    assert (answer.started.cached_prompt_tokens, answer.finished.usage.preemptions) == (2, 3)
    assert [submit.cache_root for submit in served.engine.submitted] == [b"tenant", None]
    assert [submit.limits.priority for submit in served.engine.submitted] == [0, -7]


async def test_a_stop_string_ends_with_the_preemptions_so_far(serve, tokenizer):
    served = await serve(FakeEngine(script=tokenizer.encode(TEXT), preemptions=3))
    made = spec(100)
    made.stop.stop_strings.append("list")
    answer = await served.stub.Generate(pb.GenerateRequest(spec=made))
    assert answer.finished.stop_match.stop_string == "list"
    assert answer.finished.usage.preemptions == 3


async def test_chat_is_rendered_through_the_template(serve, tokenizer):
    served = await serve()
    chat = pb.Chat(messages=[pb.ChatMessage(role=pb.ROLE_USER, content="hi")])
    rendered = await served.stub.Tokenize(pb.TokenizeRequest(chat=chat))
    await served.stub.Generate(pb.GenerateRequest(spec=pb.GenerationSpec(chat=chat, stop=pb.StopParams(max_tokens=1))))
    assert served.engine.submitted[0].token_ids == list(rendered.token_ids)
    assert "<|im_start|>user\nhi<|im_end|>" in rendered.rendered_text


async def test_tokenize_and_detokenize(serve, tokenizer):
    served = await serve()
    tokens = await served.stub.Tokenize(pb.TokenizeRequest(text=TEXT))
    assert list(tokens.token_ids) == tokenizer.encode(TEXT)
    assert (await served.stub.Tokenize(pb.TokenizeRequest(text=""))).token_ids == []
    text = await served.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == TEXT


async def test_model_and_load_are_described(serve):
    served = await serve(FakeEngine(pause_at=1))
    model = (await served.stub.GetModel(pb.GetModelRequest(model="quire-default"))).model
    assert (await served.stub.ListModels(pb.ListModelsRequest())).models == [model]
    assert (model.context_length, model.vocab_size, list(model.eos_token_ids)) == (1024, 4096, [2])
    assert model.has_chat_template
    assert model.limits.max_sequence_tokens == 1024 * 16
    assert model.limits.max_request_bytes >= 16 * 2**20
    assert model.limits.default_deadline.seconds == 600
    assert not model.defaults.HasField("max_tokens")
    call = served.stub.StreamGenerate(pb.StreamGenerateRequest(spec=spec(2)))
    await call.read()
    load = await served.stub.GetLoad(pb.GetLoadRequest())
    assert (load.running_requests, load.waiting_requests, load.accepting) == (1, 0, True)
    assert (load.total_blocks, load.block_size) == (1024, 16)
    assert load.tokens_per_second > 0


async def test_the_engines_nan_fails_this_request_alone(serve):
    from tests.rpc.conftest import failure_of

    served = await serve(FakeEngine(finish_code=FinishCode.NON_FINITE))
    failure = await failure_of(served.stub.Generate(pb.GenerateRequest(spec=spec(2))))
    assert failure.reason == "NON_FINITE_LOGITS"
