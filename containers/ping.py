"""The containers' health check: exit code 0 if the server answers that it is ready."""

import http.client
import os
import sys

port = os.environ.get("OPTION_PORT") or os.environ.get("SAGEMAKER_BIND_TO_PORT") or "8080"
try:
    # Not urllib: that would ask a proxy, if a variable names one.
    connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=4)
    connection.request("GET", "/ping")
    status = connection.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"not ready: {error}")
if status != 200:
    sys.exit(f"not ready: {status}")
