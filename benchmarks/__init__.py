"""What freevars costs, as ratios against the same code written by hand. ``python -m benchmarks``."""
