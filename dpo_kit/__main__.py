"""`python -m dpo_kit`."""

from dpo_kit.cli.main import main

if __name__ == "__main__":
    main()
