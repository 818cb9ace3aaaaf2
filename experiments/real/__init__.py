"""A pretrained model, trained on two CPU cores: how its weights are had, the runs, and their report."""
