"""Installs an archive with ComfyUI's real Manager, and uninstalls it: python manager_install.py ZIP_URL NODE_ID COPY

Started by test_install.py with COMFYUI_PATH and a base directory of its own. Only the Registry's answer is made up: where
the archive lies. Downloading, unpacking, tracking and requirements are the Manager's. COPY is a folder for what the installation
left: one process does both, because each would take ten seconds to start.
"""

import os
import shutil
import sys
from types import SimpleNamespace

url, node_id, copy = sys.argv[1:]
base = os.environ["COMFYUI_FOLDERS_BASE_PATH"]
sys.argv = ["main.py", "--cpu", "--base-directory", base]
sys.path.insert(0, os.environ["COMFYUI_PATH"])

import comfy.options

comfy.options.enable_args_parsing()

from comfyui_manager.common import cm_global, cnr_utils, context
from comfyui_manager.glob.manager_core import unified_manager

# what its prestartup script sets
cm_global.pip_overrides = {}
cm_global.pip_blacklist = {"torch", "torchaudio", "torchsde", "torchvision"}
cm_global.pip_downgrade_blacklist = [
    "torch",
    "torchaudio",
    "torchsde",
    "torchvision",
    "transformers",
    "safetensors",
    "kornia",
]
context.update_user_directory(os.path.join(base, "user", "__manager"))
folder = os.path.join(base, "custom_nodes", node_id)
cnr_utils.install_node = lambda *_: SimpleNamespace(download_url=url)
installed = unified_manager.cnr_install(node_id, "0.1.0", instant_execution=True)
print("installed:", installed.action, installed.result, installed.msg)
shutil.copytree(folder, copy)
unified_manager.active_nodes[node_id] = ("0.1.0", folder)
uninstalled = unified_manager.unified_uninstall(node_id, is_unknown=False)
print("uninstalled:", uninstalled.action, uninstalled.result, uninstalled.msg)
