"""The trainers that people use, each a module of its own: transformers, Lightning, accelerate."""
