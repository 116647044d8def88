"""What a handler written for DJL Serving's Python engine imports as `djl_python`.

In a script's process it goes by that name.
"""

from lmi_multi.serve.djl_python.inputs import Input
from lmi_multi.serve.djl_python.outputs import Output

__all__ = ["Input", "Output"]
