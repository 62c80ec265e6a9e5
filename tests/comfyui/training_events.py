"""Queues a prompt that trains, and returns as soon as the page would be told that optimisation steps are done."""

import asyncio
import json

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp comes with ComfyUI's requirements")


def queue_until(server, prompt, steps=1, seconds=120):
    """Number of the queued prompt, when its training has done ``steps`` optimisation steps; 0: when it is about to."""
    return asyncio.run(asyncio.wait_for(_queue_until(server, prompt, steps), seconds))


async def _queue_until(server, prompt, steps):
    async with aiohttp.ClientSession() as session:
        async with session.ws_connect(f"ws://{server.address}/ws?clientId={server.client}", max_msg_size=0) as socket:
            number = server.queue(prompt)
            async for message in socket:
                event = json.loads(message.data) if message.type == aiohttp.WSMsgType.TEXT else {"type": None}
                if event["type"] == "sla2.training" and event["data"]["curves"]["steps"] >= steps:
                    return number
    raise AssertionError("the server closed the connection before anything was trained")
