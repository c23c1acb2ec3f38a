"""What a run survives, counted: `make faults` does all of it and writes docs/faults.md, `make test` a part."""
