"""Less work in Triton's interpreter, whose time is Python's per operation, for the same results."""

import dataclasses
import functools

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once():
    """Halves the interpreter's time. A launch undoes the replacement at its end; in Triton 3.2 it stays."""
    patch, patched = interpreter._patch_lang, set()

    @functools.cache
    def languages(function):
        return {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}

    def patch_once(function):
        if languages(function) <= patched:
            return None
        is_launch, scope = not patched, patch(function)
        patched.update(languages(function))
        if is_launch and scope is not None:
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        return scope

    interpreter._patch_lang = patch_once


def leave_out_overflow():
    """Each sum of integers is computed a second time in 64 bits, for an assertion that only debug=True makes."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
