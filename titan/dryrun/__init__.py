"""A job that does not run: what training would take of memory, links and time, from the code of training itself."""
