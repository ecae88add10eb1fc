"""The loop of a worker process: answers pickled tasks from stdin on stdout until stdin ends.

Started by path, as `_serve.py FILE FUNCTION`, so that a worker loads what FILE asks for (RDKit alone: 0.2 s), and
neither torch nor the caller's __main__. If FILE has a `warm_up`, that is called first.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
from typing import Any


def serve(path: str, name: str) -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints must not get between the replies
    spec: Any = importlib.util.spec_from_file_location("worker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, "warm_up", lambda: None)()
    function = getattr(module, name)
    reply: object = "ready"
    while True:
        pickle.dump(reply, replies)
        replies.flush()
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reply = function(*task)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules must not stand in for others of the same name
    serve(*sys.argv[1:])
