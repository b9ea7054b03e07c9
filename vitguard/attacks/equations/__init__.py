"""Block algebra that the exact attacks share."""
