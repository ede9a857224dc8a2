"""What freevars costs, as ratios against code written by hand. ``python -m benchmarks``."""
