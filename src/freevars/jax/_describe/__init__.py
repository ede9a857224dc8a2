"""What a tracer or a captured value is, in words."""
