"""Stands in for qwen-vl-utils, which needs torchvision: verl 0.7.0 imports it although text alone is trained on."""


def _images_and_videos_are_not_to_be_had(*args, **kwargs):
    raise NotImplementedError("qwen_vl_utils is a stub")


fetch_image = fetch_video = process_vision_info = _images_and_videos_are_not_to_be_had
