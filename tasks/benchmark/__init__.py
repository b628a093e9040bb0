"""Benchmark data: found, downloaded, checked and read; none of it is ever copied."""
