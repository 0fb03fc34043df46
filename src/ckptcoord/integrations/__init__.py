"""Save reports for other tools; each needs its own package, and only when it is used."""
