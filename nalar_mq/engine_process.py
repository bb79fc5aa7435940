"""The process of the embedded model server: llama.cpp behind its OpenAI-compatible HTTP interface, on a loopback port.

Run as a file by `nalar_mq.engines`, which says how the processes of a machine share one engine. It imports nothing of the
package, so that it is up as fast as the model loads. Three files in its folder:

    engine.lock    locked by the engine for as long as it lives; the kernel unlocks it, however the engine ends
    engine.users   each process that uses the engine holds a shared lock on it; when nobody does, the engine ends
    engine.json    where it listens, and its key; there once it answers

Exit codes of the start: 0 the engine goes on in the background and holds the lock, 3 another one holds it.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Final

LOCK_NAME: Final = "engine.lock"
USERS_NAME: Final = "engine.users"
ACCESS_NAME: Final = "engine.json"
LOG_NAME: Final = "engine.log"
EXIT_ANOTHER: Final = 3
_USERS_POLL_S: Final = 0.3
_ERRORS_ONLY: Final = 1


def main(folder: Path, model: str, parallel: int, context_tokens: int, threads: int) -> int:
    """Takes the lock, goes into the background and serves until nobody uses the engine."""
    lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _try_lock(lock):
        return EXIT_ANOTHER
    if os.fork():
        return 0
    os.setsid()
    access = folder / ACCESS_NAME
    access.unlink(missing_ok=True)
    key = secrets.token_hex(16)
    server = _serve(model, key, parallel, context_tokens, threads)
    _write(access, {"url": server.listening_address, "api_key": key, "pid": os.getpid(), "model": Path(model).stem})
    users = os.open(folder / USERS_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    while not _try_lock(users):
        time.sleep(_USERS_POLL_S)
    access.unlink(missing_ok=True)
    os._exit(0)


def _serve(model: str, key: str, parallel: int, context_tokens: int, threads: int) -> Any:
    llama: Any = importlib.import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = model
    params.model_alias = {Path(model).stem}
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [key]
    params.n_parallel = parallel
    params.n_ctx = context_tokens * parallel
    params.cache_ram_mib = 0
    params.ui = False
    params.endpoint_metrics = True
    params.verbosity = _ERRORS_ONLY
    if threads:
        params.cpuparams.n_threads = threads
    return llama.Server(params)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(path: Path, content: dict[str, object]) -> None:
    """Writes the file so that a reader sees all of it or none, and nobody else reads the key."""
    draft = path.with_suffix(f".{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file)
    draft.rename(path)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])))
