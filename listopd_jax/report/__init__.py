"""From the files of a workdir to its report. Imports no JAX."""
