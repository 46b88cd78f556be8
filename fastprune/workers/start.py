"""The program of a worker process: `python .../start.py FILE_NUMBER SYS_PATH_ENTRY...`.

It is a file, since `python -c` and `python -m` put the working folder on sys.path, and a torch.py
in it would run as torch. The parent's sys.path replaces that of this process before any other
import.
"""

import sys

if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    from fastprune.workers.worker import serve

    serve(int(sys.argv[1]))
