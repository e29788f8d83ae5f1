"""From anybody's files to checked examples and tokens. Needs pyarrow for Parquet, torch only for the tokens.

``delimited`` reads CSV and TSV; ``tables`` every format, by columns; ``streams`` the same in pieces, for files of any
size; ``readers`` checks examples against a task, ``cells`` what one cell says; ``splits`` deals them to parts;
``packing`` makes tokens and packed rows of them; ``download`` fetches the public data sets. Axes in all of it: N
examples of a split, B in a batch, T tokens of these together, L of the longest, M members.
"""

__all__ = ["cells", "packing", "readers", "splits", "streams", "tables"]
