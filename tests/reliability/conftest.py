from end_to_end.conftest import assets  # noqa: F401  (the small model and its data)
