"""Tokens are text again, whatever tokens, and whatever tokenizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from assets import PRINTABLE
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from verl_valgen.prompts.tokens import REPLACEMENT, Decoder

BYTES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
WORDS = ("▁Paris", "▁is", "is", "▁", "?", "[/INST]", "<tool_call>")


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer of the SentencePiece kind, as Llama 2's: its decoder strips the first space of a text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | BYTES
    vocab |= {word: len(vocab) + i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    markers = ["[/INST]", "<tool_call>"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=markers, **names)


@pytest.fixture(scope="module")
def bytes_of_gpt():
    """A tokenizer of bytes, as GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


class Slow(PreTrainedTokenizer):
    """A tokenizer in Python that raises for a token it does not have, as SentencePiece does."""

    words = ("a", "▁b", "c")

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").removeprefix(" ")


def ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(tokens))


def utf8(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [BYTES[f"<0x{byte:02X}>"] for byte in text.encode()]


def cuts(sequence: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    for place in range(len(sequence) + 1):
        yield sequence[:place], sequence[place:]


def test_assets_tokenizer_gives_back_the_text(tokenizer):
    text = PRINTABLE + " a , b . isn't\n\n  x"
    assert Decoder(tokenizer).whole(tokenizer(text)["input_ids"]) == text


def test_an_answer_keeps_its_first_space_behind_a_prompt(pieces):
    decoder = Decoder(pieces)
    prompt = ids(pieces, "<s>", "▁Paris", "?", "[/INST]")
    answer = ids(pieces, "▁Paris", "▁is", "</s>")
    assert pieces.decode(answer, skip_special_tokens=True) == "Paris is"  # what is lost alone
    assert decoder.answer(answer, prompt) == " Paris is"
    assert decoder.whole(prompt) + decoder.whole(answer, prompt) == "<s> Paris?[/INST] Paris is</s>"


def test_wherever_prompt_and_answer_part_they_are_the_whole(pieces):
    decoder = Decoder(pieces)
    sequence = [
        *ids(pieces, "<s>", "▁Paris", "▁", "?", "▁is", "▁is"),
        *utf8(pieces, "ä 日本"),
        *ids(pieces, "▁is", "?"),
    ]
    whole = decoder.whole(sequence)
    assert whole == "<s> Paris ? is isä 日本 is?"
    for prompt, answer in cuts(sequence):
        text, rest = decoder.whole(prompt), decoder.whole(answer, prompt)
        # A character that the cut divides is the answer's, and a sign that one is missing stands in the prompt.
        assert text.rstrip(REPLACEMENT) + rest == whole
        assert text.endswith(REPLACEMENT) == (text + rest != whole)


@pytest.mark.parametrize("text", ["é" + "😀" * 40, "😀" * 40 + "é", "日" * 50], ids=len)
def test_the_bytes_of_a_long_prompt_do_not_spoil_the_answer(pieces, text):
    decoder = Decoder(pieces)
    prompt = utf8(pieces, text)
    assert decoder.whole(ids(pieces, "▁Paris"), prompt) == " Paris"
    assert decoder.whole(utf8(pieces, "😀é"), prompt) == "😀é"
    assert decoder.whole(utf8(pieces, "😀")[:2], prompt) == REPLACEMENT * 2  # an answer that is cut off


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=12), st.data())
def test_text_of_bytes_is_whole_wherever_it_is_cut(bytes_of_gpt, text, data):
    decoder = Decoder(bytes_of_gpt)
    sequence = bytes_of_gpt(text)["input_ids"]
    place = data.draw(st.integers(0, len(sequence)))
    before = decoder.whole(sequence[:place])
    rest = decoder.whole(sequence[place:], sequence[:place])
    whole = decoder.whole(sequence)
    assert before + rest == whole or (REPLACEMENT in before and whole.endswith(rest))


def test_markers_stay_and_ends_go(pieces):
    answer = ids(pieces, "<s>", "<tool_call>", "is", "</s>", "</s>")
    decoder = Decoder(pieces)
    assert decoder.answer(answer) == "<tool_call>is"
    assert decoder.whole(answer) == "<s><tool_call>is</s></s>"
    assert decoder.readable(answer) == "is"
    assert Decoder(pieces, ids(pieces, "<tool_call>")).answer(answer) == "is"


@pytest.mark.parametrize("strange", [9_999, 2**31, -1])
def test_a_token_beyond_the_vocabulary_costs_itself_alone(pieces, strange):
    decoder = Decoder(pieces)
    sequence = [*ids(pieces, "▁Paris"), strange, strange, *ids(pieces, "▁is", "</s>")]
    assert decoder.answer(sequence) == f"Paris{REPLACEMENT * 2} is"
    assert decoder.whole(ids(pieces, "▁is"), sequence) == " is"
    assert decoder.readable(sequence) == "Paris is"
    assert decoder.whole([strange]) == REPLACEMENT


def test_so_it_does_where_the_tokenizer_raises():
    tokenizer = Slow(eos_token="</s>", additional_special_tokens=["<m>"])
    with pytest.raises(IndexError):
        tokenizer.decode([0, 99])
    decoder = Decoder(tokenizer)
    assert decoder.whole([0, 1, 99, 0, 3]) == f"a b{REPLACEMENT}a</s>"
    assert decoder.answer([1, 4, 2, 3], [0]) == " b<m>c"  # no spaces around what was added
    assert decoder.readable([0, 4, 99, 1]) == "a b"


def test_a_token_that_decoding_alone_refuses_costs_itself_alone(pieces):
    class Moody(PreTrainedTokenizerFast):
        def _decode(self, token_ids: list[int], **kwargs: object) -> str:
            if 0 in token_ids:
                raise ValueError("planted")
            return super()._decode(token_ids, **kwargs)

    moody = Moody(tokenizer_object=pieces.backend_tokenizer)
    assert Decoder(moody).whole([*ids(pieces, "is"), 0, *ids(pieces, "?")]) == f"is{REPLACEMENT}?"
