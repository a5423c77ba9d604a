"""Forked workers over pipes in the place of Ray's: `verl.trainer.sft_trainer_ray` without a cluster.

`take_rays_place()` puts `ForkGroup` in the place of verl's `RayWorkerGroup`, and in the place of what the driver asks
of Ray something that does the same for it. What matters of Ray is kept: arguments, the worker's class and answers are
pickled as Ray pickles them; calls of one worker are done in order; `ray.get` of a list raises at the first error,
however long others take; an error in a worker comes as `RayTaskError`, a dead worker as `ActorDiedError`; workers know
their rank by RANK, have no LOCAL_RANK at first and none of the driver's variables of verl; their output is not the
driver's (Ray puts it there later, behind a prefix); and they do not outlive the driver. What is not: a worker is a
fork, so it has all that the driver had imported and patched by then, and Ray is not initialised in it.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

import ray
import verl.single_controller.ray as verl_ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError
from verl.single_controller.base import WorkerGroup
from verl.single_controller.ray.base import func_generator

at_worker_end: list[Callable[[], None]] = []
"""What each worker calls at its end, where the driver ends as it should."""

_PR_SET_PDEATHSIG = 1
_GRACE_S = 10.0
"""For the workers, once the driver has ended."""


def take_rays_place() -> None:
    """For the rest of this process: nothing of Ray's is started, and no thread."""
    ray.init = ray.shutdown = lambda *args, **options: None
    ray.is_initialized = lambda: True
    ray.remote = lambda *args, **options: args[0] if args else lambda cls: cls
    ray.get, ray.wait, ray.put, ray.ObjectRef = get, wait_for, Put, Reply
    verl_ray.RayWorkerGroup = ForkGroup


class Put:
    """What `ray.put` gives: a value that a worker gets for it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Reply:
    """What a call of a worker gives, in ObjectRef's place."""

    def __init__(self, worker: ForkedWorker) -> None:
        self.worker = worker
        self.is_there = False
        self.value: Any = None
        self.error: Exception | None = None

    def set(self, value: Any, error: Exception | None) -> None:
        self.value, self.error, self.is_there = value, error, True


def get(refs: Any, *, timeout: float | None = None) -> Any:
    """`ray.get`: the values, or the first error that arrives."""
    replies = refs if isinstance(refs, list) else [refs]
    if any(isinstance(reply, Put) for reply in replies):
        values = [reply.value for reply in replies]
    else:
        _wait_until(replies, lambda: any(r.error for r in replies) or all(r.is_there for r in replies), timeout)
        for reply in replies:
            if reply.error is not None:
                raise reply.error.as_instanceof_cause() if isinstance(reply.error, RayTaskError) else reply.error
        if not all(reply.is_there for reply in replies):
            raise GetTimeoutError("Get timed out: some object(s) not ready.")
        values = [reply.value for reply in replies]
    return values if isinstance(refs, list) else values[0]


def wait_for(
    refs: list[Reply], *, num_returns: int = 1, timeout: float | None = None, **_: Any
) -> tuple[list[Reply], list[Reply]]:
    """`ray.wait`: those that are there, errors too, and the others."""
    _wait_until(refs, lambda: sum(reply.is_there for reply in refs) >= num_returns, timeout)
    return [reply for reply in refs if reply.is_there], [reply for reply in refs if not reply.is_there]


def _wait_until(replies: Sequence[Reply], is_enough: Callable[[], bool], timeout: float | None) -> None:
    """Receives until it is enough or the time is over. Several threads may wait at once."""
    deadline = None if timeout is None else time.monotonic() + timeout
    while not is_enough():
        missing = [reply for reply in replies if not reply.is_there]
        if deadline is not None and time.monotonic() > deadline:
            return
        wait([worker.connection for worker in {reply.worker for reply in missing}], timeout=0.1)
        for reply in missing:
            reply.worker.receive()


class ForkedWorker:
    """A worker as the driver sees it, in the place of an actor's handle."""

    def __init__(self, pickled: bytes, environment: dict[str, str], others: Sequence[ForkedWorker]) -> None:
        self.connection, its_end = Pipe()
        self.name = f"worker {environment['RANK']}"
        self._waiting: list[Reply] = []
        self._lock = threading.Lock()
        self._is_dead = False
        for stream in (sys.stdout, sys.stderr):  # else a fork would write once more what waits to be written
            stream.flush()
        state = random.getstate()
        self.pid = os.fork()
        if self.pid == 0:
            random.setstate(state)  # Python seeds it anew; numpy and torch go on where the driver is
            for connection in (self.connection, *(other.connection for other in others)):
                connection.close()  # else a worker would not see that the driver has ended
            _run_worker(its_end, pickled, environment)
        its_end.close()

    def call(self, name: str, *args: Any, **kwargs: Any) -> Reply:
        args = tuple(arg.value if isinstance(arg, Put) else arg for arg in args)
        kwargs = {key: arg.value if isinstance(arg, Put) else arg for key, arg in kwargs.items()}
        pickled, reply = cloudpickle.dumps((name, args, kwargs)), Reply(self)
        with self._lock:
            self._waiting.append(reply)
            try:
                self.connection.send_bytes(pickled)
            except OSError:
                self._die()
        return reply

    def receive(self) -> None:
        """Takes what has come, for whichever of the calls it is."""
        with self._lock:
            while self._waiting and not self._is_dead and self.connection.poll():
                try:
                    value, error = cloudpickle.loads(self.connection.recv_bytes())
                except (EOFError, OSError):
                    self._die()
                else:
                    self._waiting.pop(0).set(value, error)

    def _die(self) -> None:
        self._is_dead = True
        while self._waiting:
            self._waiting.pop(0).set(None, ActorDiedError())

    def end(self, deadline: float) -> None:
        """Waits until it has ended by itself, as it does when its connection is closed, or kills it."""
        self.connection.close()
        while os.waitpid(self.pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)


class ForkGroup(WorkerGroup):
    """verl's `RayWorkerGroup`, as far as a trainer uses it."""

    def __init__(self, resource_pool: Any, ray_cls_with_init: Any, device_name: str = "cuda", **_: Any) -> None:
        super().__init__(resource_pool)
        worker_class = ray_cls_with_init.cls
        pickled = cloudpickle.dumps((worker_class, ray_cls_with_init.args, ray_cls_with_init.kwargs))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        for rank in range(resource_pool.world_size):
            environment = {
                "RANK": str(rank), "WORLD_SIZE": str(resource_pool.world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
            self._workers.append(ForkedWorker(pickled, environment, self._workers))
        self._driver = os.getpid()
        atexit.register(self.end)
        self._bind_worker_method(worker_class, func_generator)

    @property
    def workers(self) -> list[ForkedWorker]:
        return self._workers

    def execute_all(self, name: str, *args: Any, **kwargs: Any) -> list[Reply]:
        """Calls a method of every worker; with lists of as many items as there are workers, each gets its own."""
        given = [*args, *kwargs.values()]
        if not all(isinstance(value, list) and len(value) == self.world_size for value in given):
            return [worker.call(name, *args, **kwargs) for worker in self._workers]
        return [
            worker.call(name, *(arg[i] for arg in args), **{key: value[i] for key, value in kwargs.items()})
            for i, worker in enumerate(self._workers)
        ]

    def execute_all_sync(self, name: str, *args: Any, **kwargs: Any) -> list[Any]:
        return get(self.execute_all(name, *args, **kwargs))

    def execute_rank_zero(self, name: str, *args: Any, **kwargs: Any) -> Reply:
        return self._workers[0].call(name, *args, **kwargs)

    def execute_rank_zero_sync(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return get(self.execute_rank_zero(name, *args, **kwargs))

    execute_all_async, execute_rank_zero_async = execute_all, execute_rank_zero

    def end(self) -> None:
        """Ends the workers, which have ten seconds for what they are at."""
        atexit.unregister(self.end)
        if os.getpid() == self._driver:  # what is registered is so in forks too
            deadline = time.monotonic() + _GRACE_S
            for worker in self._workers:
                worker.connection.close()
            for worker in self._workers:
                worker.end(deadline)


def _run_worker(connection: Connection, pickled: bytes, environment: dict[str, str]) -> NoReturn:
    """The whole life of a worker, from the fork to the end of its process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    output = os.open(f"worker_{environment['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        ray.is_initialized = lambda: False  # whom it is told otherwise asks Ray about the actor that it is in
        for name in [name for name in os.environ if name.startswith("VERL_") or name == "LOCAL_RANK"]:
            del os.environ[name]
        # A fork in which the driver's tokenizers have had threads would wait for them.
        os.environ.update(environment, TOKENIZERS_PARALLELISM="false")
        _serve(connection, pickled)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


def _serve(connection: Connection, pickled: bytes) -> None:
    """Answers calls until the driver ends. What ends a program, as SystemExit, ends the worker."""
    worker_class, args, kwargs = cloudpickle.loads(pickled)
    worker = worker_class(*args, **kwargs)
    while True:
        try:
            name, args, kwargs = cloudpickle.loads(connection.recv_bytes())
        except EOFError:
            break
        answer: tuple[Any, RayTaskError | None]
        try:
            answer = getattr(worker, name)(*args, **kwargs), None
        except Exception as e:
            traceback.print_exc()
            answer = None, RayTaskError(f"{worker_class.__name__}.{name}", traceback.format_exc(), e)
        connection.send_bytes(cloudpickle.dumps(answer))
    for call in at_worker_end:
        call()
