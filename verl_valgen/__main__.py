"""`python -m verl_valgen page DIR` and `python -m verl_valgen show DIR`: a folder of samples, to look at."""
