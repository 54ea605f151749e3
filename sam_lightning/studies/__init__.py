"""Studies: a file that names runs, the runs, and what they came to."""
