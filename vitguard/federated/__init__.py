"""Federated learning in the frameworks that people already use."""
