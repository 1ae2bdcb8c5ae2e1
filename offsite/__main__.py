"""``python -m offsite``; prefer the console script, which a user's own ``client.py`` cannot shadow."""

from offsite.cli import main

if __name__ == "__main__":
    main()
