"""vitguard inside the federated frameworks that people already use."""
