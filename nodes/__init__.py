"""The ComfyUI side of SLA2. Imported through the pack's package only: ComfyUI has a module of its own called nodes."""
