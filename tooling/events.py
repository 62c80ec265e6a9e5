"""Running a prompt while listening to what the server reports on its WebSocket."""

import json
import time

import aiohttp

from .server import PromptFailed

HISTORY_WAIT_S = 10  # the entry appears slightly after the last message


async def run(server, prompt, on_progress):
    """(outputs per node, seconds per node). on_progress(node id, step, steps) is called as the server reports.

    Raises PromptFailed where ComfyUI refuses the prompt, a node fails, or the connection closes.
    """
    timeout = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        address = f"ws://{server.address}/ws?clientId={server.client}"
        async with session.ws_connect(address, max_msg_size=0) as socket:
            number = server.queue(prompt)
            seconds = await _follow(socket, number, on_progress)
    return server.history(number, HISTORY_WAIT_S)["outputs"], seconds


async def _follow(socket, number, on_progress):
    seconds, current, since = {}, None, time.monotonic()
    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = json.loads(message.data)
        kind, data = event["type"], event["data"]
        if data.get("prompt_id") != number:
            continue
        if kind == "executing":
            now = time.monotonic()
            if current is not None:
                seconds[current] = now - since
            current, since = data["node"], now
            if current is not None:
                on_progress(current, 0, 0)
        elif kind == "progress":
            on_progress(data["node"], data["value"], data["max"])
        elif kind == "execution_error":
            raise PromptFailed(
                f"{data['node_type']} (node {data['node_id']}) failed: {data['exception_message'].strip()}"
            )
        elif kind in ("execution_success", "execution_interrupted"):
            return seconds
    raise PromptFailed("ComfyUI closed the connection before the prompt ended.")
