"""A pretrained model, trained on two CPU cores: the source of its weights, the runs, and their report."""
