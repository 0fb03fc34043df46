"""What other tools have saved, read as if it meant harm."""
