"""What answers are worth: metrics of single samples, and the numbers of a round."""
