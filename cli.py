"""``python cli.py …`` in a checkout is the same program as ``clipward …`` anywhere."""

from clipward.cli import main

if __name__ == "__main__":
    main()
