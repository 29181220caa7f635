"""What `python -m benchmarks.simulate` is made of: clients in virtual time, workload mixes, and one module a table."""
