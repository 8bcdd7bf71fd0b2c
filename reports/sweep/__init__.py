"""Many runs from one grid: planned, trained and benchmarked by an executor, and read as one table."""
