"""Which prompts a run asks: rows of verl's data sets, batches of a loader, files of a user's own."""
