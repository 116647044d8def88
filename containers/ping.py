"""The containers' health check: exit code 0 if the server answers that it is ready."""

import os
import sys
import urllib.request

port = os.environ.get("OPTION_PORT") or os.environ.get("SAGEMAKER_BIND_TO_PORT") or "8080"
try:
    urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=4).close()
except OSError as error:
    sys.exit(f"not ready: {error}")
