"""What `benchmarks/svd.py` measures: the matrices, the rivals, one file a section, and the figure."""
