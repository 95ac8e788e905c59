"""Model files to tensors; nothing in a file is ever executed."""
