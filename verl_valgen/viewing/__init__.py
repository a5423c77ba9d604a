"""What a person sees of a folder of samples: the page for the browser, and `show` in a terminal."""
