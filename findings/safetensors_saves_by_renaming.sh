#!/usr/bin/env bash
# safetensors 0.8.0: save_file() writes another file, which its owner alone may read and write, and renames it. With umask
# 022 the result has mode 600, where 0.7.0 left 644, also where a file of mode 644 was written over. A symbolic link is replaced by
# a file, and what it pointed to stays as it was; 0.7.0 wrote through the link. So a LoRA that one user saves cannot be loaded by
# a ComfyUI that another user or a container runs, and a models folder made of links gets a second copy. Restore the mode
# after saving, and save to os.path.realpath(path).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q numpy==2.3.5
cat > "$folder/save.py" <<'PY'
import os
import sys
from importlib.metadata import version

import numpy as np
from safetensors.numpy import save_file

folder, wanted = sys.argv[1], sys.argv[2]
os.umask(0o022)
tensors = {"a": np.zeros(4, dtype=np.float32)}
new, old, target, link = (os.path.join(folder, name) for name in ("new", "old", "target", "link"))
with open(old, "w"), open(target, "w"):
    pass
os.symlink(target, link)
for path in (new, old, link):
    save_file(tensors, path)
modes = " ".join(f"{os.stat(path).st_mode & 0o777:o}" for path in (new, old))
through = "kept" if os.path.islink(link) else "replaced"
found = f"modes {modes}, link {through}, {'its target written' if os.path.getsize(target) else 'its target empty'}"
print(f"safetensors {version('safetensors')}: {found}")
assert found == wanted, f"expected: {wanted}"
PY
check() {
  pip install -q "safetensors==$1"
  mkdir "$folder/$1"
  "$folder/venv/bin/python" "$folder/save.py" "$folder/$1" "$2" || { echo "safetensors $1 no longer saves as described"; exit 1; }
}
check 0.7.0 "modes 644 644, link kept, its target written"
check 0.8.0 "modes 600 600, link replaced, its target empty"
echo "as seen before: 0.8.0 saves by renaming a file of its owner's"
