"""Segmentation networks: timm encoders and their decoders. Pure torch and timm."""

from mlpmatch_pl.segmentor.adapter import NetworkAdapter
from mlpmatch_pl.segmentor.deeplabv3plus import DeepLabV3Plus
from mlpmatch_pl.segmentor.dpt import DPT
from mlpmatch_pl.segmentor.encoder import Encoder, Features
from mlpmatch_pl.segmentor.linear import Linear
from mlpmatch_pl.segmentor.segmentor import Segmentor

__all__ = ["DPT", "DeepLabV3Plus", "Encoder", "Features", "Linear", "NetworkAdapter", "Segmentor"]
