"""What ends an answer, and what is shown of it: by the model, its chat template and the settings of a run.

All ranks come to the same, as all have the tokenizer and the settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cached_property

from transformers import GenerationConfig

from verl_valgen.hosts.trainer_host import TrainerHost
from verl_valgen.prompts.answers import AnswerReader
from verl_valgen.prompts.conversations import ChatTemplate
from verl_valgen.prompts.datasets import mask_is_shifted
from verl_valgen.prompts.reasoning import reasoning_end
from verl_valgen.prompts.tokens import Decoder
from verl_valgen.prompts.turn_end import TurnEnd, end_of_turn, is_added
from verl_valgen.settings.generation_config import as_ids, special_tokens
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import printable


class Wording:
    """The ends of answers, and how answers are read."""

    def __init__(self, host: TrainerHost, settings: GenerationSettings) -> None:
        self.host, self.settings = host, settings

    def special_tokens(self) -> GenerationConfig:
        """The special tokens of the model, with all that end an answer. `generation.eos_token_id` replaces those."""
        return special_tokens(self.host.generation_config, self.host.tokenizer, self.added_ends)

    @cached_property
    def added_ends(self) -> list[int]:
        """Tokens that end an answer although the model's own configuration does not say so."""
        if self._is_set("eos_token_id"):
            return []
        ends = [self._turn_end.token_id]
        if mask_is_shifted(self.host.val_dataset):  # its answers end in this one, whatever the template has
            ends.append(self.host.tokenizer.eos_token_id)
        # A tokenizer may have tokens for which the model has no embeddings.
        num_tokens = self.host.model_config.get_text_config().vocab_size
        return [i for i in dict.fromkeys(ends) if i is not None and i < num_tokens and i not in self._own_ends]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that are left out of answers: ends, beginnings and padding."""
        own = self.host.generation_config or GenerationConfig()
        others = [*as_ids(own.bos_token_id), *as_ids(own.pad_token_id), *as_ids(self._turn_end.token_id)]
        # A configuration may name any token; one that is a mark or a letter elsewhere stays there.
        ids = [*self._own_ends, *self.added_ends, *others]
        return frozenset(i for i in ids if is_added(self.host.tokenizer, i))

    @cached_property
    def reader(self) -> AnswerReader:
        tokenizer = self.host.own_tokenizer if self.settings.overlap else self.host.tokenizer
        return AnswerReader(
            Decoder(tokenizer, self.end_ids),
            self._reasoning_end,
            wants_ground_truth=self.settings.reference == "ground_truth",
        )

    def notes(self) -> Iterator[tuple[int, str]]:
        """What is to be said at the start of a run, each with its level of logging."""
        if self.added_ends:
            decoder = Decoder(self.host.tokenizer)
            more, own = (
                printable(", ".join(decoder.whole([i]) for i in ids), 200) for ids in (self.added_ends, self._own_ends)
            )
            reason = f"the model's own configuration names {own or 'no end'} alone"
            yield logging.INFO, f"answers end with {more}, too, as what is trained does; {reason}"
        end = self._turn_end
        ends_by_itself = end.token_id is not None or not end.text or bool(set(end.ids) & set(self._own_ends))
        if not (ends_by_itself or self._is_set("eos_token_id") or self._is_set("stop_strings")):
            yield (
                logging.WARNING,
                f"the chat template ends a turn with {printable(repr(end.text), 100)}, which is no special token, so "
                "that answers will not end there: set generation.stop_strings to it",
            )
        if self.settings.reasoning == "strip" and not self._reasoning_end:
            yield (
                logging.WARNING,
                "generation.reasoning=strip: the chat template shows no end of reasoning, so that answers stay whole: "
                "set generation.reasoning_end",
            )

    @cached_property
    def _own_ends(self) -> list[int]:
        return as_ids(special_tokens(self.host.generation_config, self.host.tokenizer).eos_token_id)

    @cached_property
    def _template(self) -> ChatTemplate:
        processor = getattr(self.host.val_dataset, "processor", None)  # of a vision-language model
        return ChatTemplate(self.host.tokenizer, dict(self.host.chat_template_kwargs), processor)

    @cached_property
    def _turn_end(self) -> TurnEnd:
        return end_of_turn(self._template) if self._template.source else TurnEnd("")

    @cached_property
    def _reasoning_end(self) -> str:
        """The end of the reasoning that is left out; "" where it is kept."""
        if self.settings.reasoning == "keep":
            return ""
        return self.settings.reasoning_end or (reasoning_end(self._template) if self._template.source else "")

    def _is_set(self, parameter: str) -> bool:
        """Whether a parameter is set for all answers."""
        return self.settings.parameters.get(parameter) is not None
