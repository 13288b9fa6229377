"""Pre-registration, a command: a prediction locked before the run that it predicts, and the verdict on it."""
