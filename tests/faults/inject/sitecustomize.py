"""Python imports this file at its start where its folder is in PYTHONPATH: it kills the process at a chosen moment.

FAULT=<event>:<pattern> sends SIGKILL just before an audited event (docs.python.org/3/library/audit_events.html) of that
name whose arguments match, e.g. `os.rename:samples/base` before an output gets its name. FAULT_AFTER=<n> lets n pass.
"""

import os
import re
import signal
import sys

if "FAULT" in os.environ:
    EVENT, _, PATTERN = os.environ["FAULT"].partition(":")
    passed = [None] * int(os.environ.get("FAULT_AFTER", "0"))

    def hook(event: str, arguments: tuple) -> None:
        if event == EVENT and re.search(PATTERN, " ".join(map(str, arguments))):
            if not passed:
                os.kill(os.getpid(), signal.SIGKILL)
            passed.pop()

    sys.addaudithook(hook)
