"""The objective, the fused loss and attention: each kernel with a plain reference."""
