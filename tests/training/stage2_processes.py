"""Run by torch.distributed.run: stage 2's command once for each configuration, in one start of the processes.

stage2_processes.py JSON, a list of the command's argument lists
"""

import json
import runpy
import sys

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["sla2_training.stage2", *arguments]
    try:
        runpy.run_module("sla2_training.stage2", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
