"""The animals that `make test-slow` examines, and what is known not to be right of them.

A cell that is not right and not in `KNOWN` fails its test, and so does one that is there and is right.
`python tests/zoo/page.py --known RESULTS` prints the lines that the results of a run would need.
"""

from __future__ import annotations

from typing import NamedTuple

COMMON = (
    "llama", "qwen2", "qwen3", "qwen3_moe", "qwen3_5_text", "gemma2", "gemma3_text", "gemma4_text", "mistral",
    "mixtral", "gpt_oss", "olmo3", "granite", "cohere2", "phi3", "smollm3", "glm4_moe", "deepseek_v3", "falcon_h1",
    "lfm2",
)  # fmt: skip
"""What is trained most."""

KINDS = (
    "apertus",  # cannot be built on the meta device with transformers 4.57
    "bart",  # absolute positions, which a cache's length would decide
    "bloom",  # ALiBi, from a mask of two dimensions
    "deepseek_v4",  # compresses blocks, padding too
    "diffllama",  # its constructor draws on the CPU whatever the device
    "ernie4_5_moe",  # a parameter that stays in float32
    "exaone4",  # layers without rotary positions
    "gemma2:eager",  # a soft-cap, which torch's attention does not have
    "gpt_oss:window",
    "llama4_text:chunks",
    "llama:longrope",
    "llama:lora-bias",
    "phi3:longrope",
    "qwen2:tied-lora-head",
    "qwen2:tied-lora-tokens",
    "qwen3_moe:lora-experts",
    "rwkv",  # recurrent: sees padding
    "smollm3:no-rope-first",
    "stablelm:parallel",  # partial rotary positions
    "xglm",  # a table that `from_pretrained` rounds, and that no state dict holds
)
"""One or more for each way in which a copy or a loop can go wrong."""


class Known(NamedTuple):
    """Something that is not right."""

    name: str
    what: str
    """A check; "forward", "generate" or "reload" where transformers' own model is wrong; "falls back" where `fast`
    leaves the answers to `hf`; "not built"."""
    transformers: str
    """The releases, by how their version begins, separated by blanks."""
    why: str


_NO_STEPS = "its class declares no steps of one shape"
_BEYOND = "its window or chunk is shorter than the answers"
_MISSING = "not in this release"
_CROSSING = "keeps what it cached with the tables of another length"

KNOWN = (
    Known("qwen3_moe", "falls back", "4.", _NO_STEPS),
    Known("qwen3_5_text", "not built", "4.", _MISSING),
    Known("qwen3_5_text", "falls back", "5.", _NO_STEPS),
    Known("gemma4_text", "not built", "4.", _MISSING),
    Known("mixtral", "falls back", "4.", _NO_STEPS),
    Known("glm4_moe", "falls back", "4.", _NO_STEPS),
    Known("deepseek_v3", "falls back", "4.", _NO_STEPS),
    Known("falcon_h1", "falls back", "4. 5.", _NO_STEPS),
    Known("lfm2", "falls back", "4. 5.", _NO_STEPS),
    Known("apertus", "reload", "4.", "rounds two numbers of its activation, gap 0.0079"),
    Known("bart", "falls back", "4.", "takes no position_ids"),
    Known("bart", "falls back", "5.", "counts positions by the cache"),
    Known("bloom", "falls back", "4. 5.", "makes its biases of a mask of two dimensions"),
    Known("deepseek_v4", "not built", "4.", _MISSING),
    Known("deepseek_v4", "reload", "5.", "raises in bfloat16"),
    Known("deepseek_v4", "falls back", "5.", _NO_STEPS),
    Known("ernie4_5_moe", "falls back", "4.", _NO_STEPS),
    Known("gpt_oss:window", "falls back", "4. 5.", _BEYOND),
    Known("llama4_text:chunks", "falls back", "4. 5.", _BEYOND),
    Known("llama:longrope", "generate", "5.", _CROSSING),
    Known("phi3:longrope", "generate", "5.", _CROSSING),
    Known("qwen3_moe:lora-experts", "falls back", "4.", _NO_STEPS),
    Known("rwkv", "falls back", "4. 5.", _NO_STEPS),
    Known("xglm", "falls back", "4. 5.", _NO_STEPS),
)


def known(name: str, version: str) -> dict[str, str]:
    """What is known of an animal with a release of transformers: what -> why."""
    return {
        entry.what: entry.why
        for entry in KNOWN
        if entry.name == name and version.startswith(tuple(entry.transformers.split()))
    }
