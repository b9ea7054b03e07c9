"""The trainers that people use: transformers, Lightning, accelerate. Each is a module of its own."""
