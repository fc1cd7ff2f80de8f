"""A plan as a page that teaches: a file a section; every number with its formula filled in (`titan explain`)."""
