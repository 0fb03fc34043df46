"""Bytes to bytes, without I/O: digests and the tensor file. Imports `core` and `errors` only."""
