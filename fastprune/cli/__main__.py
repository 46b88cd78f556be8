"""python -m fastprune.cli"""

from . import main

main()
