"""Other runtimes that a network could run in, each in a file of its own: what sparsepipe is measured against."""
