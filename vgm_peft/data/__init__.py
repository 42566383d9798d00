"""Data: a folder of pictures -> audited examples -> aspect buckets -> cached latents and prompts -> the batch of a step."""

from vgm_peft.data.buckets import Crop, bucket_ids, describe_crops, load_control, load_pixels, pixel_step, plan_crops
from vgm_peft.data.cache import Cache
from vgm_peft.data.encode import Encoded, encode_images, encode_prompts
from vgm_peft.data.images import scan
from vgm_peft.data.order import Order, batch_indices
from vgm_peft.data.report import Example, Report

__all__ = [
    "Cache",
    "Crop",
    "Encoded",
    "Example",
    "Order",
    "Report",
    "batch_indices",
    "bucket_ids",
    "describe_crops",
    "encode_images",
    "encode_prompts",
    "load_control",
    "load_pixels",
    "pixel_step",
    "plan_crops",
    "scan",
]
