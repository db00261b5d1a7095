import sys
from pathlib import Path

if __name__ == "__main__":
    # Python looks in this folder first, when it is run by its name; the modules beside it are meant.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from report.pages import main

    sys.exit(main())
