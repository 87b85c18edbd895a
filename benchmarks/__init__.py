"""Benchmarks behind `genco bench`; results with date and hardware stand in benchmarks/README.md."""
