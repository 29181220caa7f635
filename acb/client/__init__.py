"""The part of acb that lives inside a user's program: gate, phases, evacuation and the connection to the broker.

Standard library only: this package runs in somebody else's environment.
"""
