"""What is measured, one file each: a function ``measure() -> list[Figure | Comparison]``, its docstring says what."""
