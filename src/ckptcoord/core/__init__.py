"""Values: names, digests, sharing, the state tree, the manifest. No I/O, no torch."""
