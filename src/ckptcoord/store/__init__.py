"""Where bytes live: the Store protocol and its implementations. Nothing here knows what a checkpoint is."""
