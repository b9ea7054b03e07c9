"""A client's training loop: what the tests of this project are about."""
