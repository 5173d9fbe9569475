"""python -m workers.inference"""

import sys

from workers.inference.worker import main

sys.exit(main())
