"""What surrounds a run: recipes, stages, checkpoints, evaluation, screens, reports. The core never imports
it.
"""
