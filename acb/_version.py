"""The version of acb, in one place; the wire's hello carries it too."""

__version__ = "0.1.0"
