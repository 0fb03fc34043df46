"""The distributed shell: the only part that talks to other ranks and touches their tensors."""
