"""Implicit derivative rules and their linear algebra."""
