"""The commands: `gpu_assigner` and `acb`, one module a subcommand, whose docstring is its help text."""
