"""Requests that come at any time and leave at any time, decoded as one batch: what serve.py needs of a model."""
import asyncio
from concurrent.futures import ThreadPoolExecutor

from decode import Batch


class Engine:
    """A `Batch` that is stepped as long as it holds requests, in a thread beside the event loop that uses it."""

    def __init__(self, model, rows, size):
        self.make_batch = lambda: Batch(model, rows, size)
        self.batch, self.thread = self.make_batch(), ThreadPoolExecutor(1)
        self.task, self.left = None, []  # what runs `decode`; requests that nobody waits for any more

    def requests(self):
        """Those that run or wait."""
        return [r for r in (*self.batch.running, *self.batch.waiting) if r and not r.done]

    def add(self, *args, **kwargs):
        """A new request, as `Batch.add` makes it; its tokens come by `tokens`."""
        request = self.batch.add(*args, **kwargs)
        request.queue = asyncio.Queue()
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.decode())
        return request

    async def decode(self):
        """Step until there is nothing to do. Requests enter at any time, and leave between two steps."""
        while self.batch.busy:
            try:
                found = await asyncio.get_running_loop().run_in_executor(self.thread, self.batch.step)
            except Exception as e:  # such as too little memory: those that are here fail, later ones need not
                found = [(request, e) for request in self.requests()]
                self.batch = self.make_batch()
            for request, token in found:
                request.queue.put_nowait(token)
            while self.left:
                self.batch.drop(self.left.pop())

    async def tokens(self, request):
        """Yield (id, whether it is the last) of a request. Raises what a step has raised. Who stops listening frees the
        row."""
        try:
            for left in reversed(range(request.max_new_tokens)):
                token = await request.queue.get()
                if isinstance(token, Exception):
                    raise token
                yield token, left == 0 or token in request.stop_ids
        finally:
            self.left.append(request)
