"""Reports for this host: what a function captures, and which tracer leaked."""
