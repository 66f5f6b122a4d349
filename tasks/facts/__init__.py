"""What is on the host: facts and their parsers, nothing else."""
