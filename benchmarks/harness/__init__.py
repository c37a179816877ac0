"""What `make bench` is made of; benchmarks/run.py puts it together."""
