"""Everything that waits for a GPU, as one run of parts: ``bash benchmarks/gpu.sh``; see ``__main__``."""
