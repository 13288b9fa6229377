"""The objective, the fused loss and attention: each kernel beside a plain reference."""
