"""Names and paths of values, as a person would write them."""
