"""vgm_peft in ComfyUI: one node that loads its delta files, of every kind, into a model and its text encoders.

Link or copy this folder into ComfyUI's `custom_nodes`, and install vgm_peft into ComfyUI's Python (`pip install vgm_peft`).
Deltas are looked for where LoRAs are (`models/loras`).
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
