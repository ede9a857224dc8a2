"""Who is called what: names and paths of values, as a person would write them."""
