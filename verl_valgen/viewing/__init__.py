"""What a person sees: the page for the browser, `show` in a terminal, and lines beside verl's progress bar."""
