"""Studies: many runs by one file, and the table, figures and claims that they give."""
