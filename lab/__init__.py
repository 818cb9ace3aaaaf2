"""Everything around training: recipes, stages, checkpoints, screens, reports. The core never imports it."""
