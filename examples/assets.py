"""Small things to train on, made on the spot: a character-level Llama with random weights, and questions in parquet.

Nothing is downloaded, and no global random state is read or changed. The functions know neither verl nor verl_valgen.
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PRINTABLE = "\n" + "".join(chr(code) for code in range(ord(" "), ord("~") + 1))

# ChatML as Qwen3 writes it. With `enable_thinking=False` the generation prompt closes an empty think block, and so does
# every assistant turn: what the model is trained on begins with what it is given. verl hands over numpy arrays, as they
# come from parquet: nothing here asks whether a list is true.
CHAT_TEMPLATE = """\
{%- set think = '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false else '' -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
{{- '# Tools' -}}
{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + think + (message.content or '') -}}
{%- for call in (message.tool_calls if message.tool_calls is iterable else []) -%}
{{- '<tool_call>' + (call.function or call) | tojson + '</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' -}}
{%- elif not (tools and loop.first and message.role == 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' + think -}}{%- endif -%}
"""

CAPITALS = {
    "Austria": "Vienna",
    "Belgium": "Brussels",
    "Canada": "Ottawa",
    "Chile": "Santiago",
    "China": "Beijing",
    "Cuba": "Havana",
    "Denmark": "Copenhagen",
    "Egypt": "Cairo",
    "Finland": "Helsinki",
    "France": "Paris",
    "Germany": "Berlin",
    "Greece": "Athens",
    "India": "New Delhi",
    "Ireland": "Dublin",
    "Italy": "Rome",
    "Japan": "Tokyo",
    "Kenya": "Nairobi",
    "Norway": "Oslo",
    "Peru": "Lima",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Spain": "Madrid",
    "Sweden": "Stockholm",
    "Thailand": "Bangkok",
}
WORDINGS = (
    "What is the capital of {}?",
    "Name the capital of {}.",
    "{} has which capital?",
    "Capital of {}?",
    "{}: its capital?",
    "Tell me {}'s capital.",
    "What is {}'s capital?",
    "The capital of {} is?",
)
ADDENDS = range(5)
SYSTEM_PROMPT = "Answer in one word."


def write_model(
    directory: str | Path,
    *,
    vocab: str | None = None,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 128,
    max_position_embeddings: int = 512,
    tie_word_embeddings: bool = False,
    seed: int = 0,
    pad_token: bool = True,
) -> None:
    """Write a Llama with random fp32 weights, and its tokenizer, to `directory`, ready for `from_pretrained`.

    `vocab`: the characters that have a token of their own (default: printable ASCII and the newline); any other
    character becomes `<unk>`. The special tokens are `<unk>`, `<|im_start|>`, `<|im_end|>` (end of sequence) and,
    unless `pad_token` is false, `<|pad|>`. The weights depend on `seed` and the sizes alone.
    """
    tokenizer = _character_tokenizer(PRINTABLE if vocab is None else vocab, pad_token)
    tokenizer.model_max_length = max_position_embeddings
    token_ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=tie_word_embeddings,
        **token_ids,
    )
    # `torch.manual_seed` would seed the accelerators too, which `fork_rng` leaves alone here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**token_ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _character_tokenizer(vocab: str, pad_token: bool) -> PreTrainedTokenizerFast:
    special = {"unk_token": "<unk>", "eos_token": "<|im_end|>"} | ({"pad_token": "<|pad|>"} if pad_token else {})
    tokens = dict.fromkeys([*special.values(), "<|im_start|>", *vocab])  # distinct, in this order
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # no token types, which verl would take for media
        **special,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_questions(
    directory: str | Path, *, num_train: int, num_val: int, multiturn: bool = False, seed: int = 0
) -> tuple[Path, Path]:
    """Write `train.parquet` and `val.parquet` to `directory` and return their paths.

    Columns: `question`, `answer` (one word or number), `data_source` ("capitals" or "additions"). With `multiturn` also
    `messages`, the conversation that ends with that question and answer; every fourth row has a system message, every
    third one an earlier question and its answer.

    There are few distinct questions (a hundred or so): a larger `num_train` repeats them, and every validation question
    is a training question. A model that answers them shows that it has memorised them, not that it generalises.
    """
    rng = random.Random(seed)
    facts = _facts()
    rng.shuffle(facts)
    train = list(itertools.islice(itertools.cycle(facts), num_train))
    val = list(itertools.islice(itertools.cycle(train), num_val))
    rng.shuffle(train)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.parquet", directory / "val.parquet"
    for path, rows in zip(paths, (train, val), strict=True):
        if multiturn:
            rows = [row | {"messages": _conversation(i, row, rng.choice(facts))} for i, row in enumerate(rows)]
        pd.DataFrame(rows).to_parquet(path)
    return paths


def write_unseen_wordings(directory: str | Path, *, num_train: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.parquet` and `val.parquet` to `directory` and return their paths: capitals, in eight wordings.

    Validation asks once for each capital, in a wording that training uses for other countries but never for that one:
    a model that answers has understood which country is meant. Columns: those of `write_questions` with `multiturn`;
    every conversation is one question and its answer.
    """
    rng = random.Random(seed)
    train, val = [], []
    for i, (country, capital) in enumerate(CAPITALS.items()):
        for j, wording in enumerate(WORDINGS):
            question = wording.format(country)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": capital}]
            row = {"question": question, "answer": capital, "data_source": "capitals", "messages": messages}
            (val if j == i % len(WORDINGS) else train).append(row)
    rng.shuffle(train)
    rng.shuffle(val)

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = directory / "train.parquet", directory / "val.parquet"
    pd.DataFrame(itertools.islice(itertools.cycle(train), num_train)).to_parquet(paths[0])
    pd.DataFrame(val).to_parquet(paths[1])
    return paths


def _facts() -> list[dict[str, Any]]:
    capitals = [
        {"question": question.format(country), "answer": capital, "data_source": "capitals"}
        for country, capital in CAPITALS.items()
        for question in ("What is the capital of {}?", "Name the capital of {}.", "{} has which capital?")
    ]
    additions = [
        {"question": f"What is {a} plus {b}?", "answer": str(a + b), "data_source": "additions"}
        for a, b in itertools.product(ADDENDS, ADDENDS)
    ]
    return capitals + additions


def _conversation(index: int, fact: dict[str, Any], earlier: dict[str, Any]) -> list[dict[str, str]]:
    turns = [earlier, fact] if index % 3 == 2 else [fact]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}] if index % 4 == 3 else []
    for turn in turns:
        messages.append({"role": "user", "content": turn["question"]})
        messages.append({"role": "assistant", "content": turn["answer"]})
    return messages


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a small model and its questions.")
    parser.add_argument("directory", type=Path, help="gets model/, train.parquet and val.parquet")
    parser.add_argument("--num-train", type=int, default=2000)
    parser.add_argument("--num-val", type=int, default=32)
    parser.add_argument("--multiturn", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_model(args.directory / "model", seed=args.seed)
    write_questions(
        args.directory, num_train=args.num_train, num_val=args.num_val, multiturn=args.multiturn, seed=args.seed
    )
