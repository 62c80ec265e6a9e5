"""Events for web/js while a prompt runs, and what that prompt holds. Nothing happens where there is no ComfyUI server."""

import sys
from dataclasses import dataclass

from ..compat.executing import executing_context


@dataclass(frozen=True)
class RunningPrompt:
    """class_types: of all its nodes. workflow_id: of the page's graph, or None where the API sent no workflow."""

    class_types: frozenset[str]
    workflow_id: str | None


def server_of_page():
    """ComfyUI's server, or None where there is none."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def running_prompt():
    """RunningPrompt of the prompt that executes in this thread, or None."""
    server, context = server_of_page(), executing_context()
    if server is None or context is None:
        return None
    running, _ = server.prompt_queue.get_current_queue()
    item = next((item for item in running if item[1] == context[0]), None)
    if item is None:
        return None
    classes = frozenset(node.get("class_type", "") for node in item[2].values())
    workflow = (item[3].get("extra_pnginfo") or {}).get("workflow") or {}
    return RunningPrompt(classes, workflow.get("id"))


def send_event(kind, node_id, data):
    """Sends "sla2.<kind>" to the page that queued the running prompt. data: a dict that JSON can hold."""
    server = server_of_page()
    if server is None or node_id is None:
        return
    prompt = running_prompt()
    whose = {"node": str(node_id), "workflow": prompt.workflow_id if prompt else None}
    server.send_sync(f"sla2.{kind}", {**whose, **data}, server.client_id)
