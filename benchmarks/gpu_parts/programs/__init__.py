"""Programs that the parts start: ordinary users of a framework that do on request, line by line, what programs do."""
