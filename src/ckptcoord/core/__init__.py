"""Values: what is shared with whom, names, digests, the state tree, the manifest. No I/O, no torch."""
