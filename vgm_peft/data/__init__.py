"""Data: folders of pictures -> audited examples -> views in aspect buckets -> cached latents and prompts -> a step's batch."""

from vgm_peft.data.buckets import Crop, bucket_ids, load_control, load_mask, load_pixels, plan_crops
from vgm_peft.data.cache import Cache
from vgm_peft.data.captions import names_word, orders
from vgm_peft.data.encode import Encoded, encode_images, encode_prompts
from vgm_peft.data.faults import KINDS, Faults
from vgm_peft.data.images import scan, scan_all
from vgm_peft.data.order import Order, batch_indices
from vgm_peft.data.plan import Source
from vgm_peft.data.report import Example, Report
from vgm_peft.data.views import Framing, View, bucket_table, check_sizes, describe_views, plan_views

__all__ = [
    "KINDS",
    "Cache",
    "Crop",
    "Encoded",
    "Example",
    "Faults",
    "Framing",
    "Order",
    "Report",
    "Source",
    "View",
    "batch_indices",
    "bucket_ids",
    "bucket_table",
    "check_sizes",
    "describe_views",
    "encode_images",
    "encode_prompts",
    "load_control",
    "load_mask",
    "load_pixels",
    "names_word",
    "orders",
    "plan_crops",
    "plan_views",
    "scan",
    "scan_all",
]
