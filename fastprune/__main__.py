"""python -m fastprune"""

from .cli import main

main()
