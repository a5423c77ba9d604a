"""verl's data sets for tests, small ones, and what is read of them."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import verl
from omegaconf import OmegaConf
from packaging.version import Version
from torch.utils.data import DataLoader, Dataset
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset

from verl_valgen.prompts.datasets import prompts_from_dataset

try:
    from verl.utils.dataset import SFTDataset
except ImportError:
    SFTDataset = None

VERL = Version(verl.__version__).release
needs_sft_dataset = pytest.mark.skipif(SFTDataset is None, reason="verl >= 0.7.1 has no SFTDataset")
since_verl_0_6 = pytest.mark.skipif(
    VERL < (0, 6), reason="verl 0.5's data sets know neither apply_chat_template_kwargs nor pad_mode"
)
since_verl_0_7 = pytest.mark.skipif(VERL < (0, 7), reason="verl <= 0.6's data sets know only text")
MAX_LENGTH = 600
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}
IMAGES = {"pixel_values": torch.ones(4, 3), "image_grid_thw": torch.tensor([[1, 2, 2]])}
NO_IMAGES = [None, {}, {"token_type_ids": torch.zeros(1, 3)}, {"mm_token_type_ids": torch.zeros(1, 3)}]


def single_turn(path, tokenizer, rows=None, cls=SFTDataset, **config):
    """verl's data set of (question, answer) pairs, from a parquet file in the directory `path`."""
    # verl's data set cannot be made from a file of one row.
    rows = rows or [("What is 1 plus 2?", "3"), ("Say ' hi ' , twice .", "hi  hi"), ("?", "")]
    pd.DataFrame(rows, columns=["question", "answer"]).to_parquet(path / "single.parquet")
    settings = {"prompt_key": "question", "response_key": "answer", "max_length": MAX_LENGTH} | config
    return cls(str(path / "single.parquet"), tokenizer, OmegaConf.create(settings))


def multi_turn(path, tokenizer, conversations, columns=None, processor=None, cls=MultiTurnSFTDataset, **config):
    """verl's data set of conversations, from a parquet file in the directory `path`."""
    pd.DataFrame({"messages": conversations} | (columns or {})).to_parquet(path / "multi.parquet")
    config = OmegaConf.create({"max_length": MAX_LENGTH} | config)
    kwargs = {} if processor is None else {"processor": processor}
    return cls(str(path / "multi.parquet"), tokenizer, config, **kwargs)


def multi_turn_in_memory(tokenizer, messages):
    """verl's data set of one conversation, which parquet could not hold or would change."""
    dataset = object.__new__(MultiTurnSFTDataset)
    frame = pd.DataFrame({"messages": [messages]})
    vars(dataset).update(tokenizer=tokenizer, messages=[messages], tools=None, enable_thinking=None, max_length=8)
    vars(dataset).update(truncation="left", apply_chat_template_kwargs={}, processor=None, dataframe=frame)
    vars(dataset).update(messages_key="messages", image_key="images", video_key="videos")
    return dataset


class Items(Dataset):
    """Somebody's own data set: it returns what it is given."""

    def __init__(self, *items):
        self.items = items

    def __getitem__(self, item):
        return self.items[item]

    def __len__(self):
        return len(self.items)


def talk(*contents, system=None):
    """User and assistant in turn, after a system message if there is one."""
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def template_ids(tokenizer, messages, **kwargs):
    kwargs = {"add_generation_prompt": True} | kwargs
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)


def all_prompts(dataset, tokenizer, rows=None):
    prompts, without_answer, multi_modal = prompts_from_dataset(dataset, rows or range(len(dataset)), tokenizer)
    assert (without_answer, multi_modal) == ([], [])
    return prompts


def only_prompt(dataset, tokenizer, row=0):
    (prompt,) = all_prompts(dataset, tokenizer, [row])
    assert prompt.row == row
    return prompt


def item_ids(dataset, row):
    """The tokens of verl's own item, without padding."""
    item = dataset[row]
    ids = item["input_ids"]
    return ids[item["attention_mask"].bool()].tolist() if "attention_mask" in item else ids.tolist()


def first_batch(dataset, **kwargs):
    loader = DataLoader(dataset, batch_size=len(dataset), generator=torch.Generator(), **kwargs)
    return next(iter(loader))


def ids_and_references(prompts):
    return [(prompt.input_ids, prompt.reference) for prompt in prompts]
