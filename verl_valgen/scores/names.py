"""The names of a round's numbers that are known before there is one.

This module imports nothing: whoever checks a configuration or shows numbers needs the names alone.
"""

from __future__ import annotations

import re

ALWAYS = ("num_new_tokens", "cut_off", "empty")
"""The numbers that are reported of any samples: see `aggregates.py`."""

FURTHER = ("distinct_2", "seq_rep_4", "mean_logprob")
"""Numbers that need no metric either, and are logged with `generation.aggregates=all` alone."""

RESERVED = (*ALWAYS, *FURTHER, "num_samples", "seconds", "tokens_per_s", "best", "best_step")
"""Names that neither a metric nor a strategy can have, as a round has numbers of these names anyway."""

DERIVED = re.compile(r"(.*)_(?:best|worst|majority|pass_at_[0-9]+)")
"""Numbers that are made of several completions' scores, with the score's own name as a group."""

OWN_PROMPTS = "prompts"
"""Stands among the data sources for the prompts of one's own that name none."""
