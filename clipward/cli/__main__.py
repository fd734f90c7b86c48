"""``python -m clipward.cli`` is the same program as ``clipward``."""

from clipward.cli import main

if __name__ == "__main__":
    main()
