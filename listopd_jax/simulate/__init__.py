"""The objective of ops/ at work on chains of right-or-wrong decisions: the figures of docs/theory.md."""
