"""Whether the process in this container is ready: ready.py PORT. For HEALTHCHECK; needs nothing but Python."""

import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

try:
    # No proxies: docker puts those of its client into every container.
    build_opener(ProxyHandler({})).open(f"http://127.0.0.1:{int(sys.argv[1])}/readyz", timeout=4).close()
except (URLError, OSError) as error:
    sys.exit(str(error))
