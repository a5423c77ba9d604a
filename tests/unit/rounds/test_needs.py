"""What a round needs of a device's memory, from numbers alone."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from transformers import LlamaConfig

from verl_valgen.records import Request
from verl_valgen.rounds.needs import (
    engine_sequence_bytes,
    engine_tokens,
    largest_reading_bytes,
    largest_sequence_bytes,
    logprobs_bytes,
    prompt_bytes,
    reading_bytes,
    row_bytes,
    rows_need,
    sequence_bytes,
)

CONFIG = LlamaConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=128, max_position_embeddings=2**20,
)  # fmt: skip


def test_more_tokens_than_the_model_has_places_for_need_no_memory():
    config = LlamaConfig(max_position_embeddings=2048)
    requests = [Request([1] * 48, (0, 0), {"max_new_tokens": number}, wants_logprob=True) for number in (2000, 10**9)]
    for takes in (largest_sequence_bytes, logprobs_bytes):
        few, many = (takes([request], config, torch.bfloat16) for request in requests)
        assert 0 < few == many


def test_a_sequence_takes_at_least_its_keys_and_values():
    cache = 2 * 3 * 2 * 16 * (10 + 20) * 2
    assert cache < sequence_bytes(CONFIG, 10, 20, torch.bfloat16) < cache + 2 * 10 * 1000 + 48 * 101


def test_rows_are_as_long_as_the_longest_and_prompts_are_read_a_few_at_a_time():
    def needs(*lengths: tuple[int, int]) -> tuple[int, int]:
        requests = [Request([1] * prompt, (i, 0), {"max_new_tokens": new}) for i, (prompt, new) in enumerate(lengths)]
        return rows_need(requests, CONFIG, torch.bfloat16)

    def bytes_of(row: int, at_once: int) -> tuple[int, int]:
        return row_bytes(CONFIG, row, torch.bfloat16), prompt_bytes(CONFIG, at_once, torch.bfloat16) + 2**25

    assert needs((10, 20)) == bytes_of(64, 10)
    assert needs((10, 54), (64, 1)) == bytes_of(128, 2 * 64)
    assert needs(*[(100, 100)] * 1000) == bytes_of(256, 4096)
    assert needs(*[(100, 100)] * 10, (8000, 1)) == bytes_of(8064, 8000)  # which is read alone


def test_texts_that_are_read_together_take_room_for_the_longest_each():
    class Text(NamedTuple):
        input_ids: list[int]
        output_ids: list[int]

    long, short = Text([1] * 50, [1] * 3), Text([1] * 9, [1] * 7)

    def takes(*batches: list[Text]) -> int:
        return largest_reading_bytes(batches, CONFIG, torch.bfloat16)

    assert takes([long], [short]) == takes([long]) == reading_bytes(CONFIG, 50, 3, torch.bfloat16)
    of_one = reading_bytes(CONFIG, 50, 7, torch.bfloat16)
    assert takes([long, short]) == reading_bytes(CONFIG, 50, 7, torch.bfloat16, 2)
    # Logits of every position, and activations, for both; what judges them looks at a few rows at a time.
    assert of_one + 50 * 100 * 2 < takes([long, short]) < 2 * of_one


def asked(*lengths: tuple[int, int]) -> list[Request]:
    return [Request([1] * prompt, (i, 0), {"max_new_tokens": new}) for i, (prompt, new) in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "num_tokens"),
    [
        ([(10, 20)], 256),  # a block that is begun, and one more: a step looks ahead
        ([(10, 118)], 256),
        ([(10, 119)], 384),
        ([(10, 20), (200, 3), (3, 200)], 384),
        ([(10, 20)] * 1000, 256),  # of each; how many there are at once is the plan's
    ],
)
def test_an_engine_keeps_whole_blocks_of_the_longest_sequence(lengths, num_tokens):
    assert engine_tokens(asked(*lengths), CONFIG) == num_tokens


def test_an_engine_keeps_no_more_tokens_than_the_model_has_places_for():
    config = LlamaConfig(max_position_embeddings=2048)
    assert engine_tokens(asked((48, 10**9)), config) == engine_tokens(asked((48, 2000)), config) == 2048 + 128


def test_keys_and_values_are_divided_by_heads_among_the_ranks_of_an_engine():
    def needs(world_size: int, num_heads: int = 8, num_key_value_heads: int = 2) -> dict[int, int]:
        heads = {"num_attention_heads": num_heads, "num_key_value_heads": num_key_value_heads, "head_dim": 16}
        config = LlamaConfig(hidden_size=16 * num_heads, num_hidden_layers=3, **heads)
        return engine_sequence_bytes(asked((10, 20)), config, torch.bfloat16, world_size)

    of_a_head = 2 * 3 * 16 * 256 * 2
    assert needs(1) == {1: 2 * of_a_head}
    assert needs(4) == {1: 2 * of_a_head, 2: of_a_head, 4: of_a_head}  # of fewer heads than ranks each has a whole one
    assert needs(6) == {1: 2 * of_a_head, 2: of_a_head}  # 8 heads are not divided by 3 or 6
    assert needs(3) == {1: 2 * of_a_head}
    assert needs(16, num_heads=32, num_key_value_heads=8)[4] == 2 * of_a_head
    # Nor are heads of keys that some ranks would have whole and others in part.
    assert list(needs(6, num_heads=12, num_key_value_heads=4)) == [1, 2]
    assert list(needs(12, num_heads=12, num_key_value_heads=3)) == [1, 3, 6, 12]
