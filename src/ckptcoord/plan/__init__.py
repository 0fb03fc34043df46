"""Pure decisions: who writes what, and what the log may say next. No I/O, no rank, no clock."""
