"""A process that has imported ComfyUI; scripts start in copies of it, which spares each of them the import.

    python warm_process.py COMFYUI

Reads a line of JSON per script from standard input, {"arguments": ["script.py" or "-m", "module", ...], "folder": working
folder, "output": folder for its stdout and stderr}, and answers with its exit status.
"""

import json
import os
import runpy
import sys
from pathlib import Path


def run(arguments):
    """Runs a script as ``python ARGUMENTS`` would, for a process that ends with it."""
    if arguments[0] == "-m":
        sys.argv, sys.path[0] = arguments[1:], ""
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
        runpy.run_path(arguments[0], run_name="__main__")


def become(order):
    """The rest of the copied process's life: the script, its output in files."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(order["output"], name), os.O_CREAT | os.O_WRONLY), stream)
    os.chdir(order["folder"])
    try:
        run(order["arguments"])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # the process ends here, as an uncaught exception ends any
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main(comfyui):
    sys.path.insert(1, comfyui)  # the first entry becomes the script's folder
    sys.argv = sys.argv[:1]
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = True
    import comfy.model_patcher
    import comfy.sample
    import comfy.sd  # noqa: F401  with the loaders comes everything that takes long

    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(become(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
