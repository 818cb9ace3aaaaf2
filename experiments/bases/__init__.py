"""How the embedded models were made: their documents, and training from random weights."""
