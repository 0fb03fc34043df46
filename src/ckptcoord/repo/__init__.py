"""The repository on a Store: shards, log, manifests. Imports `plan`, `codec` and `store`."""
