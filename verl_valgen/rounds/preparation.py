"""Preparation of a run's rounds on the logging rank: reads the prompts, and logs what will come and when."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_valgen.hosts.schedule import Schedule
from verl_valgen.hosts.trainer_host import TrainerHost
from verl_valgen.prompts.answers import AnswerReader
from verl_valgen.prompts.differences import listed_rows, warn_of_differences
from verl_valgen.prompts.files import OwnPrompt
from verl_valgen.prompts.rows import chosen_rows
from verl_valgen.prompts.sources import read_prompts
from verl_valgen.records import Prompt, Query
from verl_valgen.rounds.fingerprint import fingerprint
from verl_valgen.rounds.preflight import notes_on_ignored_settings
from verl_valgen.rounds.queries import make_queries
from verl_valgen.rounds.recorder import GOES_ON, Recorder
from verl_valgen.rounds.restore import preserved_random_state
from verl_valgen.rounds.run_description import describe_run
from verl_valgen.rounds.wording import Wording
from verl_valgen.settings.settings import GenerationSettings
from verl_valgen.text import OnceLogger, printable
from verl_valgen.trackers.jsonl import run_before, set_aside

logger = logging.getLogger(__name__)


def prepare(
    host: TrainerHost,
    settings: GenerationSettings,
    file_prompts: Sequence[OwnPrompt],
    wording: Wording,
    warnings: OnceLogger,
) -> tuple[Recorder | None, list[int] | None]:
    """The recorder and the steps of the rounds; (None, None), after a warning, where there is nothing to ask.

    Raises:
        ConfigError: Prompts of a file cannot be rendered, a row does not exist, a token is not in the vocabulary.
    """
    prompts = _read_prompts(host, settings, file_prompts, wording)
    queries = make_queries(prompts, settings, vocab_size(host))
    if not queries:
        return None, None
    warn_of_differences(prompts)
    if settings.reference == "trained":
        _warn_of_untrained_reasoning(prompts, wording.reader)
    for level, line in wording.notes():
        logger.log(level, "%s", line)
    schedule = replace(host.schedule(), every=settings.every, before_train=settings.before_train)
    directory = Path(host.config.trainer.default_local_dir) / "generations"
    _announce(queries, settings, schedule, directory)
    asked = fingerprint(prompts)
    asks_others = _asks_others(directory, schedule.start_step, asked, warnings)
    _set_earlier_samples_aside(directory, schedule.start_step, warnings, best_too=asks_others)
    recorder = Recorder(
        queries,
        settings,
        reader=wording.reader,
        directory=directory,
        loggers=host.config.trainer.logger,
        verl_loggers=host.verl_loggers,
        start_step=schedule.start_step,
        prompts=asked,
        run=_describe(host, settings, schedule.start_step, asked, warnings),
    )
    return recorder, schedule.round_steps()


def _warn_of_untrained_reasoning(prompts: Sequence[Prompt], reader: AnswerReader) -> None:
    """One warning about the rows for which a perfectly trained model would score as one that says nothing."""
    lost = [prompt for prompt in prompts if prompt.row is not None and reader.is_lost(prompt)]
    if lost:
        logger.warning(
            "generation.reasoning=strip: %s %s no %s, and an answer without it counts as empty: set "
            "generation.reasoning=keep",
            listed_rows(lost),
            "train" if len({(prompt.file, prompt.row) for prompt in lost}) > 1 else "trains",
            printable(reader.reasoning_end, 100),
        )


def _describe(
    host: TrainerHost, settings: GenerationSettings, start_step: int, prompts: str, warnings: OnceLogger
) -> dict[str, Any] | None:
    try:
        return {**describe_run(host, settings, start_step), "prompts": prompts}
    except Exception as e:  # samples without a description are better than none
        warnings.warn_of_error("the folder of samples will not say which run it belongs to", e, GOES_ON)
        return None


def vocab_size(host: TrainerHost) -> int:
    """The number of tokens that the model knows."""
    return host.model_config.get_text_config().vocab_size


def _read_prompts(
    host: TrainerHost, settings: GenerationSettings, file_prompts: Sequence[OwnPrompt], wording: Wording
) -> list[Prompt]:
    """The prompts of all rounds; [] after a warning that says why there are none."""
    if (reason := host.why_no_validation_batch()) is not None:  # a file's prompts are asked where validation runs
        logger.warning("no samples: %s", reason)
        return []
    if (reason := host.why_not_generating()) is not None:
        logger.warning("no samples: %s", reason)
        return []
    with preserved_random_state(host.device):
        rows = _rows(host, settings, replaced=bool(file_prompts) and settings.prompts_mode == "replace")
        return read_prompts(
            host.val_dataset,
            rows,
            host.tokenizer,
            settings,
            host.chat_template_kwargs,
            file_prompts,
            end_ids=wording.end_ids,
        )


def _rows(host: TrainerHost, settings: GenerationSettings, *, replaced: bool) -> list[int]:
    if replaced:
        return []
    if settings.rows == "batches":
        return host.validation_rows(settings.max_val_samples)
    return chosen_rows(host.val_dataset, settings.rows, settings.max_val_samples)


def _announce(queries: Sequence[Query], settings: GenerationSettings, schedule: Schedule, directory: Path) -> None:
    """Logs how many samples come when, and which strategies, metrics and prompts are in use."""
    num_samples = sum(query.num_completions for query in queries)
    num_prompts = len({query.index for query in queries})
    each = num_samples // num_prompts
    is_even = each * num_prompts == num_samples  # unless rows have parameters of their own
    shape = f" ({num_prompts} prompts{f' x {each} completions' if is_even else ''})" if each > 1 else ""
    logger.info("%d samples%s %s, in %s", num_samples, shape, schedule, directory)
    if schedule.shortfall is not None and schedule.round_steps():
        logger.info("%s", schedule.shortfall)
    steps = schedule.round_steps()
    if settings.overlap and steps and not any(step > schedule.start_step for step in steps[:-1]):
        logger.info(
            "generation.overlap has no effect: training waits for its first and its last round, and has no more"
        )
    in_use = {
        "strategies": list(settings.strategies),
        "metrics": settings.metrics,
        f"prompts ({settings.prompts_mode})": [settings.prompts] if settings.prompts else [],
    }
    texts = [f"{name}: {printable(', '.join(values), 300)}" for name, values in in_use.items() if values]
    if texts:
        logger.info("%s", "; ".join(texts))
    for line in notes_on_ignored_settings(settings):
        logger.info("%s", line)


def _asks_others(directory: Path, start_step: int, prompts: str, warnings: OnceLogger) -> bool:
    """Whether a resumed run asks other prompts than the one that it continues, after a warning."""
    before = (run_before(directory, start_step) or {}).get("prompts")
    if before in (None, prompts):
        return False
    warnings.warn(
        f"the prompts are others than before: what was recorded up to step {start_step} is of other prompts, and a "
        "best value starts anew (reasons may be: other rows, another number of ranks, data.val_max_samples shuffled "
        "without data.seed, changed data, another chat template)"
    )
    return True


def _set_earlier_samples_aside(directory: Path, start_step: int, warnings: OnceLogger, *, best_too: bool) -> None:
    try:
        folder = set_aside(directory, start_step, best_too=best_too)
    except OSError as e:
        warnings.warn_of_error(f"samples of an earlier run stay in {directory}", e, GOES_ON)
    else:
        if folder is not None:
            is_copied = best_too and (folder / "best.json").exists()
            what = "best.json was copied, and samples of an earlier run" if is_copied else "samples of an earlier run"
            logger.info("%s beyond step %d were moved to %s", what, start_step, folder)
