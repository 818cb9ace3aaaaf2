"""Many runs of one recipe, each arm with one thing changed, and the report on them."""
