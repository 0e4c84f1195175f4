"""The special tokens of the default model and the form of its conversations (ChatML). One place for both."""

from __future__ import annotations

END_OF_TEXT, START, END, PAD = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
"""In the order of their ids: they are the first of the vocabulary."""

END_OF_TEXT_ID, START_ID, END_ID, PAD_ID = range(len(SPECIAL_TOKENS))

STOP_IDS = (END_OF_TEXT_ID, END_ID)
"""Either ends a sequence: a document, or one message."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def message(role: str, text: str) -> str:
    """One message, as the template renders it."""
    return f"{START}{role}\n{text}{END}\n"
