"""What a run is asked for: keys, their checks, where values come from. The ground floor: it imports no other room."""
