"""Competition problems: their rows, their prompts, and whether an answer is right."""
