"""The declarations of the commands, in groups; each module has an `app` with its own."""
