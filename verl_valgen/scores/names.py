"""The names of a round's numbers: those that are always there, and those that metrics and strategies must not take."""

from __future__ import annotations

import re

ALWAYS = ("num_new_tokens", "cut_off", "empty", "distinct_2", "seq_rep_4")
"""Numbers of any samples, for which no metric is needed: see `aggregates.py`."""

RESERVED = (*ALWAYS, "num_samples", "seconds", "tokens_per_s", "best", "best_step", "mean_logprob")
"""Names that neither a metric nor a strategy may have."""

DERIVED = re.compile(r"(.*)_(?:best|worst|majority|pass_at_[0-9]+)")
"""Numbers made of several completions' scores, with the score's own name as a group."""
