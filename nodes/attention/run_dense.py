"""Why an attention call runs dense: raised where the reason is known, caught where dense attention takes over."""

import logging

logger = logging.getLogger("sla2")


class RunDense(Exception):
    """This call cannot run sparse, or should not. Private to the pack: attend() of self_attention.py catches it.

    reason: one sentence. by_setting: the user's settings keep the call dense, which is no failure. sparsity: of a sparse
    output that was computed and is not used, else None.
    """

    def __init__(self, reason, *, by_setting=False, sparsity=None):
        super().__init__(reason)
        self.reason, self.by_setting, self.sparsity = reason, by_setting, sparsity


class UnsupportedCall(RuntimeError):
    """A call that SLA2 cannot take, where the user asked to stop."""


def stop_where_asked(settings, reason, where=""):
    """Raises UnsupportedCall where on_unsupported is set to stop."""
    if settings.stop_on_unsupported:
        raise UnsupportedCall(f"SLA2 stopped{where}: {reason} (on_unsupported is set to stop).")


def say_once(run, layer, reason):
    """Logs a reason the first time it occurs in a run."""
    if run.first_time(reason):
        logger.warning("SLA2: layer %s runs dense: %s (said once per run; the report counts every call)", layer, reason)
