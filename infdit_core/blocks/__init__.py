"""The picture as blocks, and the orders they are computed in."""
