"""`python -m workers.courier`."""

import sys

from workers.courier.worker import main

sys.exit(main())
