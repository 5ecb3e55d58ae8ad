"""From messages to token ids: the tokenizer's chat template, or plain text for base models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .protocol import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Put before templates that ask the clock, whose function it hides: the same day in whatever form is wanted.
_DAY = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%y": "24", "%Y": "2024", "%a": "Fri", "%A": "Friday"}
_CLOCK = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('{code}','{said}')" for code, said in {**_DAY, **dict.fromkeys(("%H", "%M", "%S"), "00")}.items())
    + " }}{% endmacro %}\n"
)
_OPEN_THOUGHT = re.compile(r"<think>\s*$")


def fixed(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Options of ``apply_chat_template`` for templates that print today's date or open a thinking block: with them answers do not
    change by the day, and are not used up by thoughts."""
    template: str = tokenizer.get_chat_template()
    clock = _CLOCK if "strftime_now" in template else ""
    return {"chat_template": clock + template, "date_string": "26 Jul 2024", "enable_thinking": False}


def check_template(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """``BadInput`` if ``template`` is ``chat`` and the tokenizer has none."""
    if template == "chat" and not tokenizer.chat_template:
        raise BadInput(
            "the tokenizer has no chat template",
            where="evaluation.template",
            fix="Set `template: plain` (turns as plain text, right for base models), or use a tokenizer with a chat template",
        )


def plain(messages: Sequence[Message]) -> str:
    """Turns as plain text: each ends with a newline, an answer and a system message with a blank line; no role names.

    >>> plain([Message("system", "Be brief."), Message("user", "2+2?"), Message("assistant", "4"), Message("user", "3+3?")])
    'Be brief.\\n\\n2+2?\\n4\\n\\n3+3?\\n'
    """
    return "".join(m.content + ("\n" if m.role == "user" else "\n\n") for m in messages)


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str) -> tuple[int, ...]:
    """Token ids of a prompt that ends where the answer begins."""
    if template == "plain":
        ids = tokenizer(plain(messages)).input_ids
        return tuple(ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids)  # some tokenizers end every text
    return tuple(tokenizer(_chat(tokenizer, messages), add_special_tokens=False).input_ids)


def _chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    from jinja2.exceptions import TemplateError

    options = fixed(tokenizer)

    def render(turns: Sequence[Message]) -> str:
        chat: list[dict[str, Any]] = [m._asdict() for m in turns]
        text: str = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False, **options)  # type: ignore
        if text.endswith("<|start|>assistant"):  # gpt-oss, which would begin with its channel of thoughts
            return text + "<|channel|>final<|message|>"
        return text.rstrip() + "\n\n</think>\n\n" if _OPEN_THOUGHT.search(text) else text

    problem: Exception | None = None
    try:
        text = render(messages)
        if messages[0].role != "system" or messages[0].content.strip() in text:
            return text
    except TemplateError as e:
        problem = e
    # Templates without a system role, which refuse it (Gemma, early Mistral) or pass it over, and with strictly alternating roles.
    try:
        return render(alternating(messages))
    except TemplateError as e:
        raise BadInput(f"the chat template refuses the messages: {problem or e}", where="evaluation.template") from e


def alternating(messages: Sequence[Message]) -> list[Message]:
    """The same chat with the system text at the head of the first user turn, and neighbours of one role joined."""
    out: list[Message] = []
    for m in messages:
        role = "user" if m.role == "system" else m.role
        if out and out[-1].role == role:
            out[-1] = Message(role, f"{out[-1].content}\n\n{m.content}")
        else:
            out.append(Message(role, m.content))
    return out
