"""What it does in which time, measured."""
