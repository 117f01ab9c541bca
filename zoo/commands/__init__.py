"""The commands of `python -m zoo`, one file each, with `main(argv) → exit code`."""
