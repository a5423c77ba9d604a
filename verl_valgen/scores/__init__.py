"""Scores: metrics judge single samples, aggregates make the numbers of a round of them."""
