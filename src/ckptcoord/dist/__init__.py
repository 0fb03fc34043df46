"""The distributed shell: the only part that talks to other ranks and the only way to the trainer's tensors."""
