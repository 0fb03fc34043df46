"""Where bytes live: the Store protocol and its implementations."""
