"""What a GPU is asked in one short loan: is it right, how fast is each stage, which kernels take the time."""
