"""The wide area network between gateway and login nodes: a TCP proxy that does harm when told.

Usage: wan_proxy.py CONFIG.json REPORT_FD. Each link has one listening port on this machine and one target. Commands come
as one JSON object per connection on a Unix socket, answers are one JSON object.

A link is one of: up; cut (connections reset, new ones refused); half-open (nothing passes, nobody is told; what was sent
arrives after `restore`). `lose` forgets the present connections without a word, as a router that rebooted does:
they stay silent until a `cut`, and neither side hears of the other's end; new ones work. Delay and throttle hold in each direction and add up; what is on its way when
the link is cut is lost.
"""
import asyncio
import collections
import contextlib
import json
import os
import random
import socket
import struct
import sys

CHUNK = 256 * 1024
IN_FLIGHT = 8 * 1024 * 1024  # most bytes on the way per connection and direction; then the sender is held back
SOCKET_BUFFER = 1024 * 1024  # the kernel's share, bounded so that a throttled sender feels it


class Direction:
    def __init__(self):
        self.delay = 0.0  # seconds, one way
        self.rate = 0.0  # bytes per second, 0 = unlimited
        self.free_at = 0.0  # when the bytes already admitted have passed the bottleneck
        self.bytes = 0


class Link:
    def __init__(self, name, host, port, target):
        self.name, self.host, self.port, self.target = name, host, port, tuple(target)
        self.up, self.down = Direction(), Direction()  # up: towards the login node
        self.mode = "up"
        self.flapping = None
        self.connections = set()
        self.accepted = self.resets = 0
        self.changed = asyncio.Event()
        self.listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
        self.listener.setblocking(False)
        self._bind()
        self.accepting = None

    def _bind(self):
        # A port of our own choice, below the range from which the system gives ports to others, so that it can be
        # closed and opened again without anybody else getting it.
        candidates = [self.port] if self.port else random.sample(range(20000, 32000), 50)
        for port in candidates:
            try:
                self.listener.bind((self.host, port))
                self.port = port
                return
            except OSError as error:
                last = error
        raise OSError(f"no free port on {self.host} for the link '{self.name}': {last}")

    def notify(self):
        self.changed.set()
        self.changed = asyncio.Event()

    async def pause(self, seconds):
        """Waits, but no longer than until the link's settings change."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), seconds)

    def open(self):
        if self.accepting is None:
            self.listener.listen(128)
            self.accepting = asyncio.ensure_future(self._accept())

    def refuse(self):
        """Keeps the port, refuses connections: a listening socket that was shut down can listen again."""
        if self.accepting is not None:
            self.accepting.cancel()
            self.accepting = None
            self.listener.shutdown(socket.SHUT_RDWR)

    async def _accept(self):
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(self.listener)
            self.accepted += 1
            Connection(self, client).start()

    # -- what can be done to it ------------------------------------------------------------------------------
    def directions(self, which):
        return {"up": [self.up], "down": [self.down]}.get(which, [self.up, self.down])

    def set_mode(self, mode):
        self.mode = mode
        if mode == "cut":
            self.refuse()
            for connection in list(self.connections):
                connection.reset()
                self.resets += 1
        else:
            self.open()
        self.notify()

    def lose(self):
        for connection in self.connections:
            connection.lost = True
        self.notify()

    def stop_flapping(self):
        if self.flapping:
            self.flapping.cancel()
            self.flapping = None

    async def flap(self, up_seconds, down_seconds, count):
        done = 0
        while not count or done < count:
            self.set_mode("cut")
            await asyncio.sleep(down_seconds)
            self.set_mode("up")
            await asyncio.sleep(up_seconds)
            done += 1
        self.flapping = None

    def restore(self):
        self.stop_flapping()
        for direction in (self.up, self.down):
            direction.delay = direction.rate = direction.free_at = 0.0
        self.set_mode("up")

    def status(self):
        return {"mode": "flapping" if self.flapping else self.mode, "host": self.host, "port": self.port,
                "target": list(self.target), "connections": len(self.connections),
                "lost_connections": sum(c.lost for c in self.connections),
                "accepted": self.accepted, "resets": self.resets,
                "bytes_up": self.up.bytes, "bytes_down": self.down.bytes,
                "delay_up": self.up.delay, "delay_down": self.down.delay,
                "rate_up": self.up.rate, "rate_down": self.down.rate}


class Connection:
    def __init__(self, link, client):
        self.link, self.client, self.server = link, client, None
        self.lost = False
        self.tasks = []
        self.finished = 0
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def start(self):
        self.link.connections.add(self)
        self.tasks = [asyncio.ensure_future(self._run())]

    async def _run(self):
        try:
            while self.link.mode == "half-open":
                await self.link.changed.wait()
            self.server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self.server.setblocking(False)
            self.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
            await asyncio.get_running_loop().sock_connect(self.server, self.link.target)
        except OSError:
            self.reset()
            return
        for source, target, direction in ((self.client, self.server, self.link.up),
                                          (self.server, self.client, self.link.down)):
            self.tasks.append(asyncio.ensure_future(self._pump(source, target, direction)))

    async def _pass(self):
        """Returns when bytes may pass; False if they never will."""
        while self.link.mode == "half-open" and not self.lost:
            await self.link.changed.wait()
        return not self.lost

    async def _pump(self, source, target, direction):
        loop = asyncio.get_running_loop()
        queue, room = collections.deque(), asyncio.Event()
        arrived = asyncio.Event()
        size = 0
        sending = False

        async def deliver(data):
            if not await self._pass():
                return
            if data:
                await loop.sock_sendall(target, data)
                direction.bytes += len(data)
            else:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)

        async def writer():
            nonlocal size, sending
            while True:
                while not queue:
                    arrived.clear()
                    await arrived.wait()
                sending = True
                sent_at, data = queue[0]
                wait = sent_at + direction.delay - loop.time()
                if wait > 0:
                    await self.link.pause(wait)
                    continue
                queue.popleft()
                await deliver(data)
                size -= len(data)
                sending = False
                room.set()
                if not data:
                    return

        writing = asyncio.ensure_future(self._guard(writer()))
        self.tasks.append(writing)

        async def reader():
            nonlocal size
            while True:
                if not await self._pass():
                    while await loop.sock_recv(source, CHUNK):  # a lost connection swallows everything
                        pass
                    return
                piece = CHUNK if not direction.rate else max(1024, min(CHUNK, int(direction.rate / 20)))
                data = await loop.sock_recv(source, piece)
                while direction.rate:  # one bottleneck for all connections of the link
                    now = loop.time()
                    if direction.free_at <= now:
                        direction.free_at = now + len(data) / direction.rate
                        break
                    await self.link.pause(direction.free_at - now)
                if not queue and not sending and not direction.delay:
                    await deliver(data)
                else:
                    queue.append((loop.time(), data))
                    size += len(data)
                    arrived.set()
                    while size > IN_FLIGHT:
                        room.clear()
                        await room.wait()
                if not data:
                    return

        await self._guard(reader())
        if queue or sending:
            await writing
        writing.cancel()
        self.finished += 1
        if self.finished == 2:  # both sides have ended, in their own time
            self.close()

    async def _guard(self, work):
        """A broken side breaks the other one, unless the link has forgotten the connection."""
        try:
            await work
        except OSError:
            if not self.lost:
                self.reset()

    def reset(self):
        for side in (self.client, self.server):
            if side is not None:
                with contextlib.suppress(OSError):
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.link.connections.discard(self)
        current = asyncio.current_task()
        for task in self.tasks:
            if task is not current:
                task.cancel()
        for side in (self.client, self.server):
            if side is not None:
                # An operation that waits on the descriptor must go first, or a later socket with the same number
                # would meet its callback.
                loop = asyncio.get_running_loop()
                with contextlib.suppress(OSError, ValueError):
                    if side.fileno() >= 0:
                        loop.remove_reader(side.fileno())
                        loop.remove_writer(side.fileno())
                side.close()


def perform(links, request):
    action = request.get("action")
    names = [request["link"]] if request.get("link") else list(links)
    unknown = [name for name in names if name not in links]
    if unknown:
        return {"error": f"no link '{unknown[0]}'; known: {', '.join(links)}"}
    for link in (links[name] for name in names):
        directions = link.directions(request.get("direction"))
        if action == "delay":
            for direction in directions:
                direction.delay = request["value"]
            link.notify()
        elif action == "throttle":
            for direction in directions:
                direction.rate = request["value"]
                direction.free_at = 0.0
            link.notify()
        elif action in ("cut", "half-open"):
            link.stop_flapping()
            link.set_mode(action)
        elif action == "lose":
            link.lose()
        elif action == "restore":
            link.restore()
        elif action == "flap":
            link.stop_flapping()
            link.flapping = asyncio.ensure_future(link.flap(request["up"], request["down"], request["count"]))
        elif action != "status":
            return {"error": f"no action '{action}'"}
    return {name: links[name].status() for name in names}


async def serve(config, report):
    links = {}
    for name, link in config["links"].items():
        links[name] = Link(name, config["host"], link.get("port", 0), link["target"])
        links[name].open()

    async def control(reader, writer):
        with contextlib.suppress(ConnectionError):
            try:
                answer = perform(links, json.loads(await reader.readline()))
                await asyncio.sleep(0)  # a cut has reached the sockets before the answer does
            except (ValueError, KeyError, OSError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    with contextlib.suppress(FileNotFoundError):
        os.unlink(config["control"])
    server = await asyncio.start_unix_server(control, config["control"])
    os.chmod(config["control"], 0o600)
    os.chown(config["control"], config["owner"], -1)
    os.write(report, json.dumps({name: link.port for name, link in links.items()}).encode())
    os.close(report)
    await server.serve_forever()


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        config = json.load(file)
    report = int(sys.argv[2])
    try:
        asyncio.run(serve(config, report))
    except OSError as error:
        os.write(report, f"!{error}".encode())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
