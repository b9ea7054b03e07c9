"""What `benchmarks/fuzz.py` changes, and how."""
