"""What surrounds a run: recipes, stages, checkpoints, evaluation, screens, plots, reports. Imports the core, never the other way."""
