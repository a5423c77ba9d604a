"""Chat templates that behave as those of well-known models do, as far as it matters to what is trained.

No installed package has theirs, so these are small ones of our own: which markers there are, which turns keep their
reasoning, what the generation prompt opens or closes, how a turn ends, and which conversations are refused.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

# Where a message's reasoning is: in a field of its own, or in its content before the end of a think block.
_TEXT = """\
{%- macro text(m) -%}
{%- if m.content is string -%}{{- m.content -}}
{%- else -%}{%- for part in m.content or [] -%}{{- part.text -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""
_REASONING = (
    _TEXT
    + """\
{%- macro reasoning(m) -%}
{%- if m.reasoning_content is string -%}{{- m.reasoning_content -}}
{%- elif '</think>' in text(m) -%}{{- text(m).split('</think>')[0].split('<think>')[-1].strip('\\n') -}}
{%- endif -%}
{%- endmacro -%}
{%- macro answer(m) -%}{{- text(m).split('</think>')[-1].lstrip('\\n') -}}{%- endmacro -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
"""
)
_TOOLS = """\
{%- if tools -%}
{{- '<|im_start|>system\\n# Tools' -}}
{%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
"""
_CALLS = """\
{%- for call in (m.tool_calls if m.tool_calls is iterable else []) -%}
{{- '<tool_call>\\n' + (call.function or call) | tojson + '\\n</tool_call>' -}}
{%- endfor -%}
"""
_QWEN_MESSAGES = (
    """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > ns.last_user and (ALWAYS loop.last or reasoning(m)) -%}
{{- '<think>\\n' + reasoning(m) + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- answer(m) -}}"""
    + _CALLS
    + """\
{{- '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + m.role + '\\n' + text(m) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
)

QWEN3 = (
    _REASONING.replace("last_user=-1", "last_user=messages|length - 1")  # a conversation without a question has none
    + _TOOLS
    + _QWEN_MESSAGES.replace("ALWAYS ", "")
    + """\
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""
)
QWEN3_5 = (
    _REASONING
    + "{%- if ns.last_user < 0 -%}{{- raise_exception('No user query found in messages.') -}}{%- endif -%}"
    + _TOOLS
    + _QWEN_MESSAGES.replace("ALWAYS ", "true or ")
    + """\
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- else -%}{{- '<think>\\n' -}}{%- endif -%}
{%- endif -%}
"""
)
DEEPSEEK = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|User|>' + m.content -}}
{%- elif m.role == 'assistant' -%}
{{- '<|Assistant|>' + (m.content or '').split('</think>')[-1] + '<|end_of_sentence|>' -}}
{%- else -%}{{- m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}
"""
GLM = (
    _REASONING
    + """\
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{- '<|user|>\\n' + m.content -}}
{%- elif m.role == 'assistant' -%}
{{- '<|assistant|>\\n<think>' + (reasoning(m) if loop.index0 > ns.last_user else '') + '</think>\\n' + answer(m) -}}
{%- elif m.role == 'tool' -%}{{- '<|observation|>\\n' + m.content -}}
{%- else -%}{{- '<|system|>\\n' + m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' + ('\\n<think></think>\\n' if enable_thinking is defined and enable_thinking is false else '') -}}
{%- endif -%}
"""
)
GPT_OSS = """\
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}
{%- if m.thinking is string and loop.last and not add_generation_prompt -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}
{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""
LLAMA_3_1 = """\
{{- bos_token -}}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\n\\n' -}}
{%- for tool in tools or [] -%}{{- tool | tojson -}}{%- endfor -%}
{%- if messages[0].role == 'system' -%}{{- messages[0].content | trim -}}{%- endif -%}
{{- '<|eot_id|>' -}}
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + '<|eot_id|>' -}}
{%- elif m.tool_calls is iterable and m.tool_calls | length -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{{- '<|python_tag|>' + m.tool_calls[0].function.name + '<|eom_id|>' -}}
{%- elif m.role != 'system' -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""
MISTRAL = (
    _TEXT
    + """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- if m.role == 'user' -%}{{- '[INST] ' + text(m) + ' [/INST]' -}}
{%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
)


class Family(NamedTuple):
    """A template with its markers."""

    template: str
    special: tuple[str, ...]
    """Tokens of their own, and special."""
    end: str | None
    """The token that ends a turn."""
    reasoning_end: str = ""
    added: tuple[str, ...] = ()
    """Tokens of their own that are ordinary text."""


_THINK = ("<think>", "</think>")
_CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_CALL = ("<tool_call>", "</tool_call>")
FAMILIES = {
    "Qwen3": Family(QWEN3, _CHATML, "<|im_end|>", "</think>", (*_THINK, *_CALL)),
    "Qwen3.5": Family(QWEN3_5, _CHATML, "<|im_end|>", "</think>", (*_THINK, *_CALL)),
    "DeepSeek": Family(
        DEEPSEEK, ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>"), "<|end_of_sentence|>", "</think>", _THINK
    ),
    "GLM": Family(
        GLM,
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"),
        None,
        "</think>",
        _THINK,
    ),
    "gpt-oss": Family(
        GPT_OSS,
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|return|>",
        "<|channel|>final<|message|>",
    ),
    "Llama 3.1": Family(
        LLAMA_3_1,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"),
        "<|eot_id|>",
    ),
    "Mistral": Family(MISTRAL, ("[INST]", "[/INST]", "</s>"), "</s>"),
}


def tokenizer_of(family: Family, tokenizer: Any) -> Any:
    """A copy of `tokenizer` with the template and the tokens of a family; its end is that of a document."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens(
        {
            "additional_special_tokens": list(family.special),
            "bos_token": "<s>",
            "eos_token": "</s>" if "</s>" in family.special else "<|document|>",
        }
    )
    made.add_tokens(list(family.added))
    made.chat_template = family.template
    return made
