from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlavaProcessor


@pytest.fixture
def rng_stays():
    before = torch.random.get_rng_state()
    yield
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.fixture
def processor(tokenizer):
    """A vision-language model's processor, whose template sets a bar after every part of a content."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil as ImageProcessor,
        )
    except ImportError:  # transformers < 5
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor as ImageProcessor
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content %}{{ part.text }}|{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    # Qwen2VLProcessor asks for a video processor, and that for torchvision.
    return LlavaProcessor(ImageProcessor(), copy.deepcopy(tokenizer), patch_size=14, chat_template=template)
