"""What a decorated solver is, the same for both hosts."""
