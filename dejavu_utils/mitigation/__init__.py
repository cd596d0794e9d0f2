"""What lowers the score, and what it costs."""
