"""The folder of samples as files, and what a person sees: the page, `show` in a terminal, lines beside verl's bar."""
