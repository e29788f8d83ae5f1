"""What the demo data says: one module for each preset, with its templates and ``example(rng)``. See demo.py."""
