"""The attention override that ComfyUI calls, and keeping it in front of overrides that later nodes set."""

import functools
import logging
import threading

from ..compat.compiled_models import not_compiled
from ..compat.override_chain import MARK, chosen_in_comfyui, find_in, name_of, ours_in, states_of
from ..compat.own_attention import PREFERRED
from .model_call import CALL, LAYER
from .self_attention import attend

logger = logging.getLogger("sla2")

DEFAULT = "comfy.ldm.modules.attention.attention_pytorch"


def make_override(hook, base):
    """The attention override: a closure over ``hook`` that falls back to ``base``, the override that was there before."""
    base_name = base and name_of(chosen_in_comfyui(base) or base)

    @not_compiled
    def sla2_attention_override(func, *args, **kwargs):
        options = kwargs.get("transformer_options") or {}
        call, layer = options.get(CALL), options.get(LAYER)
        func = options.get(PREFERRED) or func
        below = func if base is None else functools.partial(base, func)
        counted_as_it_entered = layer is not None and (call is None or call.run.aside)
        if hook.handed_on.is_running or (call is not None and call.hook is not hook):
            return below(*args, **kwargs)
        name = name_of(func) if base is None else base_name
        run = hook.run_for_call() if call is None else call.run

        def below_seen(*args, **kwargs):
            if call is None or not call.repeated:
                run.see_handed_on(name, args, kwargs)
            return hook.handed_on.run(below, args, kwargs)

        if counted_as_it_entered:
            return below_seen(*args, **kwargs)
        if call is None or layer is None or hook.family_reason:
            if call is None or not call.repeated:
                run.count_other(hook.family_reason)
            if hook.family_reason:
                say_family(hook.family_reason, run)
            return below_seen(*args, **kwargs)
        run.see_backend(name_of(func))
        return attend(call, layer, below_seen, args, kwargs, is_default=base is None and name == DEFAULT)

    setattr(sla2_attention_override, MARK, hook)
    sla2_attention_override.sla2_base = base
    return sla2_attention_override


class HandedOn(threading.local):
    """Whether this thread runs a call that our override handed on: attention calls made there are passed through uncounted."""

    is_running = False

    def run(self, below, args, kwargs):
        was, self.is_running = self.is_running, True
        try:
            return below(*args, **kwargs)
        finally:
            self.is_running = was


def say_family(reason, run):
    """Logs once per run why no call of this family runs sparse."""
    if run.first_time(reason):
        logger.warning("SLA2: every attention call runs dense: %s", reason)


class OutermostOverride:
    """Keeps a hook's override in front of those that later nodes set. Holds no hook, so that a dropped model is freed at once."""

    def __init__(self):
        self._known = (None, None)  # the override that a model call came with, and the one that it got

    def clear(self):
        self._known = (None, None)

    def of(self, hook, run, current):
        """``current`` where it leads to ours, else ours in front of it."""
        known, override = self._known
        if current is not known or override is None:
            ours = ours_in(current, hook)
            if ours is None:
                override = _put(hook, run, current, _replaced_note(current))
            elif current is not ours and _came_back(current, ours.sla2_base):
                override = _put(hook, run, current, _returned_note(current))
            else:
                override = current
            self._known = (current, override)
        return override

    def never_called(self, hook, run, current):
        """An override that holds ours did not call it in a whole model call: from the next one on, ours is in front of it."""
        if self._known == (current, current):
            self._known = (current, _put(hook, run, current, _replaced_note(current)))


def _put(hook, run, current, note):
    run.note(note)
    return make_override(hook, current)


def _replaced_note(current):
    if current is None:
        return "a later node removed the attention override; SLA2 restored it"
    return (
        f"a later node replaced the attention override with {name_of(current)}, which does not call SLA2; "
        "SLA2 went back in front of it, and it runs the dense calls (place that node before SLA2 Apply Attention)"
    )


def _came_back(current, base):
    """Whether ``current`` belongs to a node whose override is below ours already, and which put itself in front again."""
    states = {id(state) for state in states_of(current)}
    return find_in(base, lambda function: any(id(state) in states for state in states_of(function))) is not None


def _returned_note(current):
    return (
        f"{name_of(current)} put itself in front of SLA2, which was placed after it: SLA2 went back in front of it, "
        "and it runs the calls that SLA2 does not take"
    )
