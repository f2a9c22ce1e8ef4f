"""The version, alone in its module: the build reads it without importing anything else."""

VERSION = "0.1.0"
