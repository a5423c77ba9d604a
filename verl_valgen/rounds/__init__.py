"""The rounds of a run: when they take place, what is asked, how it is answered, what is recorded."""
