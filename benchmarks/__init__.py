"""What acb costs, one module a question: ``python -m benchmarks.NAME``."""
