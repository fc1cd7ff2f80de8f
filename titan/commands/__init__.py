"""The commands of `titan`, a file each: its docstring is what `titan <command> --help` prints, `run` does it."""
