"""Import hooks: one package a framework, each with an ``install(module)`` called when that framework has been imported."""
