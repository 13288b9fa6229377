"""A command: labels 0-10 of reviews by a language model and a rubric."""
