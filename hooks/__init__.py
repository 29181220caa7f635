"""Import hooks: one package a framework, whose ``install(module)`` is called when that framework has been imported."""
