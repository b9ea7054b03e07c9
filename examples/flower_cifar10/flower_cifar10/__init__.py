"""A Flower app whose clients seal what they send."""
