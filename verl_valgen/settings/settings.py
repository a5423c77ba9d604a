"""The settings of generation: every key with its default, its check, its environment variable and its meaning.

This module owns what can be set, and what goes together. `generation_config.py` knows what transformers makes of a
parameter, `load.py` where values come from. What a value names (a backend, a metric, a file) is none of their business:
`rounds/preflight.py` looks for it. The module is long because each key is declared here, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from typing import Any, NamedTuple

from verl_valgen.settings import checks, generation_config
from verl_valgen.settings.checks import Check, ConfigError, Mistakes, plain

_DTYPES = checks.one_of(
    *("auto", "float32", "bfloat16", "float16"),
    aliases={"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"},  # verl's spellings
)
_STRATEGIES = checks.mapping_of_mappings("(?!by_source$)[A-Za-z0-9_-]{1,64}", "letters, digits, _ and -; not by_source")


class Setting(NamedTuple):
    """The declaration of one key."""

    name: str
    """The field of `GenerationSettings`: what the key ends in."""
    default: Any
    """`dataclasses.MISSING` where it depends."""
    check: Check
    meaning: str
    """In Markdown, for the table of keys."""
    variable: str | None


def setting(
    default: Any, check: Check, meaning: str, *, variable: str | None = None, section: str = "generation"
) -> Any:
    """A field of `GenerationSettings` with all that is declared of its key; `list` and `dict` stand for empty ones."""
    metadata = {"check": check, "meaning": meaning, "variable": variable, "section": section}
    if default in (list, dict):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class GenerationSettings:
    """The settings of the rounds, checked. Generation parameters have Hugging Face's names and meanings."""

    enabled: bool = setting(
        MISSING,
        checks.boolean(),
        "`false` switches everything off. By default on where there is a `generation` block or one of these variables",
        variable="VERL_GENERATION_ENABLED",
    )
    do_sample: bool = setting(
        True,
        checks.boolean(),
        "`false`: greedy decoding; sampling settings are checked but ignored",
        variable="VERL_GENERATION_DO_SAMPLE",
    )
    temperature: float = setting(
        1.0,
        checks.number("a number > 0 (for greedy decoding set do_sample=false)", lambda x: x > 0),
        "above 0; lower is closer to greedy decoding",
        variable="VERL_GENERATION_TEMPERATURE",
    )
    top_k: int = setting(
        50,
        checks.at_least(0, "0 switches it off"),
        "sample from the `top_k` most likely tokens; 0 switches it off",
        variable="VERL_GENERATION_TOP_K",
    )
    top_p: float = setting(
        0.7,
        checks.share(),
        "sample from the most likely tokens whose probabilities add up to `top_p`; 1.0 switches it off",
        variable="VERL_GENERATION_TOP_P",
    )
    max_new_tokens: int = setting(
        100,
        checks.at_least(1),
        "longest answer, in tokens; a round stops early when all answers have ended",
        variable="VERL_GENERATION_MAX_NEW_TOKENS",
    )
    max_val_samples: int = setting(
        5,
        checks.at_least(0, "0 switches generation off"),
        "how many validation prompts to answer; 0 switches generation off",
        variable="VERL_MAX_VAL_SAMPLES",
        section="trainer",
    )
    rows: str | Sequence[int] | Mapping[str, int] = setting(
        "batches",
        checks.rows(),
        "which rows of the validation data are asked. `batches`: those of rank 0's first validation batches; `first`: "
        "the first of the data, whatever the number of ranks; a list of rows, counted over all files from 0; "
        "`{per_source: 2}`: the first two of each `data_source`. `max_val_samples` limits the first two",
    )
    seed: int = setting(
        0,
        checks.integer("an integer in [0, 2**63)", lambda x: 0 <= x < 2**63),
        "seed of the sampled tokens",
        variable="VERL_GENERATION_SEED",
    )
    n: int = setting(1, checks.at_least(1), "completions of each prompt; one where nothing is sampled")
    best_of: int = setting(
        1, checks.at_least(1), "best-of-N: sample N, keep the one with the highest mean token log-probability"
    )
    strategies: Mapping[str, Mapping[str, Any]] = setting(
        dict,
        _STRATEGIES,
        "`{name: {parameter: value, ...}, ...}`: parameters on top of the others; every prompt is answered under each",
    )
    params_key: str = setting(
        "generation_params",
        checks.text(),
        "column of the validation data with a row's own parameters: a mapping, or a mapping as JSON",
    )
    turn: str = setting(
        "last",
        checks.one_of("last", "first", "all"),
        "which assistant turns of a conversation are answered: `last`, `first`, `all`",
    )
    reasoning: str = setting(
        "keep",
        checks.one_of("keep", "strip"),
        "`strip`: `generation` and `reference` are what follows the reasoning; the whole is in `generation_raw` and "
        "`reference_raw`",
    )
    reasoning_end: str = setting(
        "",
        checks.optional_text(),
        "what ends the reasoning, such as `</think>`; by default as the chat template has it",
    )
    reference: str = setting(
        "trained",
        checks.one_of("trained", "ground_truth"),
        "what answers are compared with: what is `trained`, or the row's `ground_truth`",
    )
    prompts: str = setting(
        "",
        checks.optional_text(),
        "a file of prompts: `.jsonl`, `.parquet`, `.txt`; a relative path starts from the working directory",
    )
    prompts_mode: str = setting(
        "replace",
        checks.one_of("replace", "append"),
        "`replace`: the file's prompts instead of the validation data's; `append`: after them",
    )
    before_train: bool = setting(False, checks.boolean(), "generate at the step that training starts from too")
    every: int = setting(
        1, checks.at_least(1), "generate at every k-th validation (counted from step 0) and at the last one"
    )
    metrics: Sequence[str] = setting(
        list,
        checks.texts(may_be_empty=True),
        "`exact_match`, `token_f1`, `rouge_l`, `bleu`, `chrf`, `math`, or functions: `file.py:function`, "
        "`module:function`, `name=module:function`",
    )
    best_metric: str = setting(
        "",
        checks.optional_text(),
        "the number whose best value is kept in `best.json`, such as `exact_match`; with strategies that of one of "
        "them, such as `nucleus/exact_match`",
    )
    best_mode: str = setting(
        "max", checks.one_of("max", "min"), "whether the best value of `best_metric` is its largest or its smallest"
    )
    dtype: str = setting(
        "auto",
        _DTYPES,
        "`float32`, `bfloat16`, `float16`; auto: bfloat16 as verl trains, float32 on CPU",
    )
    backend: str = setting(
        "auto",
        checks.name(),
        "`fast`: our own decoding loop, one CUDA graph per token; `hf`: Hugging Face's loop; `vllm`: [vLLM](vllm.md), "
        "where it is installed, for models larger than a device; auto: `fast` on CUDA and CPU, `hf` elsewhere",
    )
    compile: bool = setting(
        False,
        checks.boolean(),
        "run the step of `fast`, or vLLM's model, through torch.compile: faster steps, half a minute or more longer in "
        "the first round",
    )
    batch_size: int | str = setting(
        "auto",
        checks.auto_or(checks.at_least(1)),
        "most prompts that one rank answers at once; auto: by free memory up to 256 (`fast`) or 64",
    )
    ranks: int | str = setting(
        "auto",
        checks.auto_or(checks.at_least(1)),
        "most ranks that answer, each with a copy of the model; auto: as many as there are full batches",
    )
    tensor_parallel: int | str = setting(
        "auto",
        checks.auto_or(checks.at_least(1)),
        "with `backend: vllm`: how many ranks hold the model together; auto: the fewest that have room for it",
    )
    gather: str = setting(
        "auto",
        checks.one_of("auto", "copy", "sharded"),
        "how the answering ranks get the weights. `copy`: a plain copy of the model on each of them; `sharded`: no "
        "copy, all ranks generate through the sharded model; auto: `sharded` where no copy fits",
    )
    verify: bool | str = setting(
        True,
        checks.boolean_or("first"),
        "whether the trainer's own model reads two answers of a round and must have chosen (nearly) the same tokens: "
        "`true`: in every round; `first`: in the first, and after a change of the way that answers are made; `false`",
    )
    overlap: bool = setting(
        False,
        checks.boolean(),
        "whether training goes on while a round is answered, on the logging rank alone. `true`: training waits for the "
        "gather, a copy stays in memory until the answers are there, and samples come "
        "[later](how-it-works.md#training-goes-on)",
    )
    max_round_time_s: float = setting(
        0.0,
        checks.number("a number of seconds >= 0 (0: no limit)", lambda x: x >= 0),
        "seconds after which a round ends; unfinished answers get the finish reason `time`; 0: no limit",
    )
    aggregates: str = setting(
        "main",
        checks.one_of("main", "all"),
        "which [numbers](judging.md#the-numbers-of-a-round) of a round are logged. `main`: those that most people "
        "watch; `all`: further ones for each strategy and source",
    )
    console: str = setting(
        "full",
        checks.one_of("full", "samples", "brief", "none"),
        "what the console shows of a round. `full`: prompts, answers, references, scores and a summary; `samples`: "
        "prompts and answers, and a summary; `brief`: the summary alone; `none`: nothing",
    )
    console_prompts: int = setting(
        20, checks.at_least(1), "most prompts that the console shows of a round, each with one answer of each strategy"
    )
    page: bool = setting(
        True, checks.boolean(), "write `generations/index.html`, a page for the browser that grows with every round"
    )
    page_to_trackers: bool = setting(
        False, checks.boolean(), "hand the page as one file to WandB and MLflow at the end of the run"
    )
    mlflow_tags: int = setting(
        5, checks.at_least(0, "0: none"), "prompts whose latest answers are shown as tags of the MLflow run"
    )
    max_log_chars: int = setting(500, checks.at_least(16), "longer texts are cut on the console, and then end in `...`")
    max_tracker_chars: int = setting(
        4000, checks.at_least(16), "longer texts are cut in trackers; the JSONL files always have the whole text"
    )
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Any other field of `transformers.GenerationConfig`, by names that `load_settings` checks. None is dropped: there
    it means "not set"."""

    def __post_init__(self) -> None:
        for key, declared in SETTINGS.items():
            object.__setattr__(self, declared.name, declared.check(getattr(self, declared.name), key))
        given = {name: value for name, value in self.extra.items() if value is not None}
        extra = {name: check_value(f"generation.{name}", value) for name, value in given.items()}
        object.__setattr__(self, "extra", extra)

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters that are in force, as `transformers.GenerationConfig` takes them.

        With do_sample false, those that only sampling uses are left out: transformers would warn of them.
        """
        own = {name: getattr(self, name) for name in _OWN_PARAMETERS}
        unused = frozenset() if self.do_sample else generation_config.SAMPLING_ONLY
        return {name: value for name, value in {**own, **self.extra}.items() if name not in unused}

    def overridden(self, params: Mapping[str, Any], source: str) -> GenerationSettings:
        """These settings with other generation parameters (`best_of` among them), checked as those of a run are.

        Args:
            params: None unsets a parameter that has no default of ours.
            source: Where they come from, for errors.

        Raises:
            ConfigError: One is unknown, refused or wrong, or they do not go together.
        """
        if not params:
            return self
        checked = check_overrides(params, source)
        extra = {name: value for name, value in checked.items() if name not in _OVERRIDABLE}
        own = {name: value for name, value in checked.items() if name in _OVERRIDABLE}
        changed: dict[str, Any] = {**own, "extra": {**self.extra, **extra}}
        result = dataclasses.replace(self, **changed)
        generation_config.check(result.parameters, source)
        return result


_OWN_PARAMETERS = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")
"""The fields of `transformers.GenerationConfig` that have a default of ours."""
_OVERRIDABLE = (*_OWN_PARAMETERS, "best_of")
"""The settings that a strategy or a row may change."""


def _declared(one: dataclasses.Field) -> Setting:
    default = one.default if one.default_factory is MISSING else one.default_factory()
    check, meaning, variable = (one.metadata[what] for what in ("check", "meaning", "variable"))
    return Setting(one.name, default, check, meaning, variable)


SETTINGS: Mapping[str, Setting] = {
    f"{one.metadata['section']}.{one.name}": _declared(one)
    for one in dataclasses.fields(GenerationSettings)
    if one.metadata  # `extra` has no key of its own
}
"""Key -> what is declared of it."""

_ANYTHING = checks.finite()


def check_value(key: str, value: object, source: str | None = None) -> Any:
    """The value as the key wants it; errors name `source`, or else the key."""
    if key in SETTINGS:
        check = SETTINGS[key].check
    else:
        check = generation_config.CHECKS.get(key.removeprefix("generation."), _ANYTHING)
    return check(value, source or plain(key))


def check_name(section: str, name: str, known: Mapping[str, str]) -> None:
    """Refuses a name that nobody reads. transformers takes any in silence, so that a misspelt parameter would be lost.

    Args:
        section: What the name stands in: `generation`, `generation.strategies.hot`.
        known: Name -> the key that is set under it; another key than this one is suggested.
    """
    shown = f"{section}.{plain(name)}"
    if name in generation_config.REFUSED:
        raise ConfigError(f"{shown} is not supported: {generation_config.REFUSED[name]}")
    if known.get(name) != f"{section}.{name}":
        close = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.7)
        hint = f"did you mean {known[close[0]]}?" if close else "transformers.GenerationConfig has no such field"
        raise ConfigError(f"unknown key {shown}: {hint}")


def known_keys() -> dict[str, str]:
    """Name -> key of all that can be set, fields of the installed `transformers.GenerationConfig` among them."""
    fields = {name: f"generation.{name}" for name in generation_config.field_names()}
    return fields | {declared.name: key for key, declared in SETTINGS.items()}


def check_overrides(params: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The parameters of a strategy or a row, each checked by itself: see `GenerationSettings.overridden`.

    Raises:
        ConfigError: Some are unknown, refused or wrong; all of these are told.
    """
    known = {name: f"{source}.{name}" for name in (*generation_config.field_names(), *_OVERRIDABLE)}
    once = {declared.name: key for key, declared in SETTINGS.items() if declared.name not in _OVERRIDABLE}
    checked: dict[str, Any] = {}
    mistakes = Mistakes()
    for name, value in ((str(name), value) for name, value in params.items()):
        with mistakes.noted():
            if name in once:
                raise ConfigError(f"{source}: {name} is set once for the run, as {once[name]}")
            check_name(source, name, known)
            is_unset = value is None and name not in _OVERRIDABLE
            checked[name] = None if is_unset else check_value(f"generation.{name}", value, f"{source}.{name}")
    mistakes.raise_if_any()
    return checked
