"""`politune`, `python -m politune`, and what torchrun and accelerate launch start."""

from politune import interrupts


def main() -> None:
    """Runs the command line."""
    interrupts.leave_at_once()
    from politune import cli

    cli.main()


if __name__ == "__main__":
    main()
