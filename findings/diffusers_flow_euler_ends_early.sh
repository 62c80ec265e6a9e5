#!/usr/bin/env bash
# diffusers 0.42.1, torch 2.13.0: two schedulers of one shift and one number of steps have different noise levels.
# FlowMatchEulerDiscreteScheduler spaces its n steps evenly from 1 down to the lowest of its 1,000 training levels, both ends
# included, and shifts afterwards levels that it had shifted already. So the last of n steps begins next to zero, and the
# other n - 1 cover the whole way: 4 steps at shift 5 run at 1, 0.910, 0.717, 0.024. UniPCMultistepScheduler with
# use_flow_sigmas, which Wan's pipelines come with, and the samplers in which few-step LoRAs are distilled and run elsewhere,
# have 1 - i / n, shifted once: 1, 0.938, 0.834, 0.626. set_timesteps(sigmas=[1, 1 - 1/n, ..., 1/n]) gives these to the former too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip() { "$folder/venv/bin/python" -m pip "$@"; }
pip install -q torch==2.13.0 numpy==2.3.5 diffusers==0.42.1
cat > "$folder/levels.py" <<'PY'
import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler


def shifted(levels, shift):
    return shift * levels / (1 + (shift - 1) * levels)


for steps in (4, 8):
    for shift in (1.0, 5.0, 12.0):
        euler = FlowMatchEulerDiscreteScheduler(shift=shift)
        unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
        euler.set_timesteps(steps)
        unipc.set_timesteps(steps)
        found, other = (scheduler.sigmas[:-1].double().numpy() for scheduler in (euler, unipc))
        print(f"{steps} steps, shift {shift:g}: Euler {found.round(3).tolist()}\n{'':18s} UniPC {other.round(3).tolist()}")
        even = np.linspace(1, 0, steps + 1)[:-1]
        assert np.abs(other - shifted(even, shift)).max() < 3e-3, "UniPC's levels are others now"
        lowest = shifted(0.001, shift)  # shifted once when the scheduler is made, and again below
        ends_included = shifted(np.linspace(1, lowest, steps), shift)
        assert np.abs(found - ends_included).max() < 1e-6, "Euler's levels are others now"
        assert found[-1] < 0.35 * other[-1]
        euler.set_timesteps(sigmas=even.tolist())
        assert np.abs(euler.sigmas[:-1].numpy() - shifted(even, shift)).max() < 1e-6
print("as seen before: Euler's last step of n begins next to zero")
PY
"$folder/venv/bin/python" "$folder/levels.py" || { echo "diffusers' schedulers no longer differ as described"; exit 1; }
