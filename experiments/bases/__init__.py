"""How the bundled models were made: their documents, and training from random weights."""
