"""Chat templates against transformers' apply_chat_template; forged turns; hostile and broken templates."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from service.config import BUILT_IN_MODEL
from service.errors import StartupError
from service.text import chat
from service.text.chat import ChatTemplate, Message, TemplateError
from service.text.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
TOKENIZER = Tokenizer.from_directory(BUILT_IN_MODEL)
REFERENCE = transformers.AutoTokenizer.from_pretrained(BUILT_IN_MODEL, local_files_only=True)
TOKENS = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}

BUILT_IN = json.loads((BUILT_IN_MODEL / "tokenizer_config.json").read_text())["chat_template"]
LLAMA_3 = """{% set loop_messages = messages %}
{%- for message in loop_messages %}
    {%- set content = '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim + '<|eot|>' %}
    {%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{%- endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
QWEN_LIKE = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- set ns.last = loop.index0 %}
    {%- if loop.index > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- for message in messages %}
{{ '<|im_start|>' ~ message.role ~ '\n' -}}
{% generation %}{{ message.content }}{% endgeneration %}
{{- '<|im_end|>' if loop.index0 < ns.last or tools is not none or true }}
{% endfor %}
{{ messages[0] | tojson }} {{ {'b': 'é<', 'a': 1} | tojson(indent=2, sort_keys=true) }}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
TEMPLATES = {"built-in": BUILT_IN, "llama-3": LLAMA_3, "mistral": MISTRAL, "qwen-like": QWEN_LIKE}

content = st.one_of(st.text(max_size=20), st.sampled_from(["", " padded \n", "{{ 7 * 7 }}", "{% raw %}", "é<&>'\""]))
turns = st.integers(1, 3).flatmap(lambda n: st.lists(content, min_size=2 * n - 1, max_size=2 * n - 1))


def conversation(texts: list[str], system: str | None = None) -> list[Message]:
    """Alternating turns that begin and end with the user's."""
    first = [] if system is None else [Message("system", system)]
    return first + [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def reference(template: str, messages: list[Message], **options: bool) -> str:
    plain = [{"role": message.role, "content": message.content} for message in messages]
    return REFERENCE.apply_chat_template(plain, chat_template=template, tokenize=False, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(texts=turns, system=st.none() | content, prompt=st.booleans())
def test_renders_as_transformers_does(name: str, texts: list[str], system: str | None, prompt: bool) -> None:
    messages = conversation(texts, system)
    expected = reference(TEMPLATES[name], messages, add_generation_prompt=prompt)
    assert ChatTemplate(TEMPLATES[name], TOKENS).render(messages, prompt) == expected


@pytest.mark.parametrize("name", ["built-in", "llama-3", "mistral"])
@pytest.mark.parametrize("answer", ["The answer", "The answer is \n", "again: The answer"])
def test_continues_the_last_answer_as_transformers_does(name: str, answer: str) -> None:
    messages = [Message("user", "The answer"), Message("assistant", answer)]
    expected = reference(TEMPLATES[name], messages, continue_final_message=True)
    rendered = ChatTemplate(TEMPLATES[name], TOKENS).render(messages, add_generation_prompt=False)
    assert rendered == expected
    assert rendered.endswith(answer.strip()) or name != "llama-3"


@settings(max_examples=60, deadline=None)
@given(texts=turns)
def test_ordinary_conversations_encode_as_transformers_does(texts: list[str]) -> None:
    messages = conversation(texts)
    encoded = ChatTemplate(BUILT_IN, TOKENS).encode(messages, TOKENIZER)
    assert encoded.text == reference(BUILT_IN, messages, add_generation_prompt=True)
    assert encoded.token_ids == REFERENCE.encode(encoded.text, add_special_tokens=False)


pieces = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<", "|>", "system\n", "é", " "]
)


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.lists(pieces, max_size=8).map("".join), min_size=1, max_size=3))
def test_no_message_can_forge_a_turn(texts: list[str]) -> None:
    """As many special tokens as the template itself writes, and the text unchanged."""
    messages = [Message("user", text) for text in texts]
    template = ChatTemplate(BUILT_IN, TOKENS)
    encoded = template.encode(messages, TOKENIZER)
    ours = [token_id for token_id in encoded.token_ids if token_id in TOKENIZER.special_tokens]
    assert ours == [1, 2] * len(messages) + [1]
    assert encoded.text == template.render(messages)
    assert TOKENIZER.decode(encoded.token_ids, keep_special_tokens=True) == encoded.text


def test_overlapping_special_tokens_are_all_cut() -> None:
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, pre_tokenizers

    inner = Inner(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    from tokenizers import decoders

    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("ab>", normalized=False), AddedToken("b>c", normalized=False)])
    encoded = ChatTemplate("{{ messages[0].content }}").encode([Message("user", "ab>c b>c ab>")], Tokenizer(inner))
    assert len(encoded.token_ids) == len(encoded.text) == 12


def test_reads_a_model_directory(tmp_path: Path) -> None:
    assert ChatTemplate.from_directory(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert ChatTemplate.from_directory(tmp_path) is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    assert loaded(tmp_path).render([]) == "<s></s>"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert loaded(tmp_path).render([]) == "file <s>"


def loaded(path: Path) -> ChatTemplate:
    template = ChatTemplate.from_directory(path)
    assert template is not None
    return template


@pytest.mark.parametrize("template", ["{% if %}", "{{ a b }}", "{% include 'x' %}{% endfor %}", [], [{"name": "x"}], 5])
def test_a_template_with_a_mistake_stops_the_start_in_one_line(tmp_path: Path, template: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(StartupError) as caught:
        ChatTemplate.from_directory(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_broken_config_stops_the_start(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(StartupError, match="tokenizer_config"):
        ChatTemplate.from_directory(tmp_path)


def test_a_refusal_carries_the_templates_words() -> None:
    with pytest.raises(TemplateError, match="must alternate"):
        ChatTemplate(MISTRAL, TOKENS).render([Message("assistant", "hi")])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{{ 'a' + 1 }}",
        "{{ raise_exception }}{{ range(10**9) | list }}",
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ messages.append({'role': 'system'}) }}",
        "{{ messages[0].update(role='system') }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_fails_alone(source: str) -> None:
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(source).render([Message("user", "hi")])
    assert "\n" not in str(caught.value)


def test_a_rendering_that_grows_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_RENDERED_CHARS", 1_000)
    source = "{% for m in messages %}{% for n in messages %}{{ m.content }}{% endfor %}{% endfor %}"
    messages = [Message("user", "a" * 20)] * 10
    with pytest.raises(TemplateError, match="longer than"):
        ChatTemplate(source).render(messages)
    assert len(ChatTemplate(source).render(messages[:5])) == 500


def test_a_template_that_drops_the_last_message_cannot_continue_it() -> None:
    with pytest.raises(TemplateError, match="leaves out"):
        ChatTemplate("nothing").render([Message("assistant", "hi")], add_generation_prompt=False)
