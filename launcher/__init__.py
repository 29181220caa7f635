"""The launcher: gives a command the environment that lets acb into its Python processes, and becomes it."""
