"""Turns a conversation into a prompt, the text that a person reads, and the reference: for data sets and files alike.

This module knows messages and chat templates. It does not know where messages come from. Messages are mappings with a
`role`; their `content` may be anything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from verl_valgen.prompts.tokens import Decoder, encode
from verl_valgen.records import Prompt

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template, with the arguments that every conversation is rendered with."""

    tokenizer: Any
    kwargs: Mapping[str, Any]
    """Arguments of `apply_chat_template`: `tools`, `enable_thinking`, whatever the template knows."""
    processor: Any = None
    """A vision-language model's processor, which then renders and tokenizes instead of the tokenizer."""
    end_ids: Collection[int] = ()
    """The tokens that end an answer."""

    @property
    def decoder(self) -> Decoder:
        return Decoder(self.tokenizer, self.end_ids)

    @property
    def source(self) -> str:
        """The template itself, or several of them; "" where there is none."""
        renderer = self.tokenizer if self.processor is None else self.processor
        return str(getattr(renderer, "chat_template", None) or "")

    def checksum(self, messages: Sequence[Message]) -> str:
        """Stands for all that makes the prompt of `messages`, of which a template may make another one every day."""
        given = json.dumps([messages, self.kwargs, self.source], default=str, sort_keys=True)
        return hashlib.sha256(given.encode()).hexdigest()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of `messages`, followed by those of the generation prompt."""
        batch = self._apply(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        return batch["input_ids"][0].tolist()

    def reference(self, messages: Sequence[Message], turn: int) -> str:
        """The text of `messages[turn]`, stripped.

        That is its content. Where it calls tools, or its content is empty, it is what the template renders for it.
        """
        text = readable(messages[turn].get("content"))
        if not text or messages[turn].get("tool_calls"):
            text = self.rendered(messages, turn)
        return text.strip()

    def rendered(self, messages: Sequence[Message], turn: int) -> str:
        """`messages[turn]` as the template renders it at the end of a conversation, without the end of the turn."""
        prompt = self.render(messages[:turn], add_generation_prompt=True)
        whole = self.render(messages[: turn + 1])
        # A template need not continue its own generation prompt (think blocks): the answer begins where they part.
        answer = whole[len(os.path.commonprefix([prompt, whole])) :]  # noqa: RUF071 (character by character is meant)
        return self.decoder.answer(encode(self.tokenizer, answer))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of `messages`; raises whatever the template raises."""
        return self._apply(messages, add_generation_prompt=add_generation_prompt, tokenize=False)

    def _apply(self, messages: Sequence[Message], **kwargs: Any) -> Any:
        renderer = self.tokenizer if self.processor is None else self.processor
        return renderer.apply_chat_template(messages, **{**self.kwargs, **kwargs})


class NoChatTemplate(ChatTemplate):
    """Stands in where the tokenizer has no chat template: a single text is the prompt as it is."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of the only message, with the special tokens that the tokenizer adds.

        Raises:
            ValueError: There is more than one message, or it is not the user's.
        """
        if [message["role"] for message in messages] != ["user"]:
            raise ValueError("the tokenizer has no chat template, so that a prompt must be one text")
        return self.tokenizer(readable(messages[0].get("content")))["input_ids"]

    def reference(self, messages: Sequence[Message], turn: int) -> str:
        """The content of `messages[turn]`, stripped."""
        return readable(messages[turn].get("content")).strip()


def prompt_for_turn(
    messages: Sequence[Message],
    turn: int,
    template: ChatTemplate,
    *,
    row: int | None = None,
    reference: str | None = None,
) -> Prompt:
    """The prompt that asks for `messages[turn]` anew, or for a message after the last if `turn` is `len(messages)`.

    Its text is the last user message, or the whole prompt without special tokens where no user has said anything.

    Args:
        row: The row of the data set that the conversation is, if it is one.
        reference: A reference that replaces the text of `messages[turn]`.

    Raises whatever the chat template raises.
    """
    before = messages[:turn]
    input_ids = template.prompt_ids(before)
    questions = [message.get("content") for message in before if message["role"] == "user"]
    text = readable(questions[-1]) if questions else template.decoder.readable(input_ids)
    if reference is None and turn < len(messages):
        reference = template.reference(messages, turn)
    not_shown = _in_words(turns=len(questions), tools=template.kwargs.get("tools"))
    return Prompt(row, input_ids, text, reference, not_shown=not_shown, source=template.checksum(before))


def _in_words(turns: int, tools: Any) -> str:
    """How many turns of the user and how many tools a model is given, where more than the text of one turn."""
    num_tools = len(tools) if isinstance(tools, Sized) and not isinstance(tools, str) else 0
    parts = [f"{turns} turns"] * (turns > 1) + [f"{num_tools} tool{'s' * (num_tools > 1)}"] * (num_tools > 0)
    return ", ".join(parts)


def answered_turns(messages: Sequence[Message], turn: str) -> list[int]:
    """The indices of the assistant's messages that are to be answered anew; `[len(messages)]` if there is none.

    A conversation that begins with the assistant has nothing to answer there.

    Args:
        turn: `generation.turn`: last, first, all.
    """
    turns = [i for i, message in enumerate(messages) if i > 0 and message["role"] == "assistant"]
    chosen = {"first": turns[:1], "last": turns[-1:], "all": turns}[turn]
    return chosen or [len(messages)]


def readable(content: Any) -> str:
    """The text of a message's content, be it a string or a list of parts such as `{"type": "text", "text": ...}`."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "".join(part.get("text") or "" for part in parts if isinstance(part, dict))
