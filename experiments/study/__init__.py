"""Does GRPO -> SFT -> GRPO beat GRPO alone? Many runs of one recipe, and what they say together."""
