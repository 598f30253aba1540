"""Windows over event time and over numbers of rows: which rows belong together and when an answer is due."""
