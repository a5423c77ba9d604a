"""The settings of a run: keys, their checks, where values come from. The ground floor: this imports no other room."""
