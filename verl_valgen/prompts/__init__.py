"""The prompts of a run: rows of verl's data sets, batches of a loader, and files of a user's own."""
