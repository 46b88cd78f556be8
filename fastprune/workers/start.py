"""The program of a worker process: `python .../start.py FILE_NUMBER SYS_PATH_ENTRY...`.

A file of our own, since `python -c` and `python -m` begin with the working folder on sys.path, and
a torch.py there would run as torch. The parent's sys.path replaces that of this process before
anything else is imported.
"""

import sys

if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    from fastprune.workers.worker import serve

    serve(int(sys.argv[1]))
