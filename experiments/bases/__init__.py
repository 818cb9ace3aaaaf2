"""How the embedded models of `model/` were made: documents to learn from, and their training from random weights."""
