"""Prompts, label mappings, and the frozen networks that they are for."""

from __future__ import annotations

from lightning_trust.nn.prompting.anti_adversary import AntiAdversary
from lightning_trust.nn.prompting.backbones import Backbone, BackboneSpec, create_backbone
from lightning_trust.nn.prompting.class_wise_prompt import ClassWisePrompt
from lightning_trust.nn.prompting.clip_classifier import ClipClassifier
from lightning_trust.nn.prompting.clip_templates import CLIP_TEMPLATES_81
from lightning_trust.nn.prompting.fairness_adversary import FairnessAdversary
from lightning_trust.nn.prompting.frame_prompt import FramePrompt, LearnableScale
from lightning_trust.nn.prompting.fully_mapping import FullyMapping
from lightning_trust.nn.prompting.label_mapping import LabelMapping
from lightning_trust.nn.prompting.name_similarity import name_similarity
from lightning_trust.nn.prompting.open_clip_models import create_clip, save_clip
from lightning_trust.nn.prompting.prompts import AdditivePrompt, PadPrompt, PatchPrompt, Prompt, WatermarkPrompt
from lightning_trust.nn.prompting.saved_prompt import load_prompt, save_prompt
from lightning_trust.nn.prompting.text_encoder import ClipTextEncoder, TextEncoder, class_texts, clean_class_name
from lightning_trust.nn.prompting.text_triggers import HardTextTrigger, SoftTextTrigger, TextTrigger
from lightning_trust.nn.prompting.triggers import BorderTrigger, ConcatTrigger, PatchTrigger
from lightning_trust.nn.prompting.visual_prompt import VisualPrompt

__all__ = [
    "CLIP_TEMPLATES_81",
    "AdditivePrompt",
    "AntiAdversary",
    "Backbone",
    "BackboneSpec",
    "BorderTrigger",
    "ClassWisePrompt",
    "ClipClassifier",
    "ClipTextEncoder",
    "ConcatTrigger",
    "FairnessAdversary",
    "FramePrompt",
    "FullyMapping",
    "HardTextTrigger",
    "LabelMapping",
    "LearnableScale",
    "PadPrompt",
    "PatchPrompt",
    "PatchTrigger",
    "Prompt",
    "SoftTextTrigger",
    "TextEncoder",
    "TextTrigger",
    "VisualPrompt",
    "WatermarkPrompt",
    "class_texts",
    "clean_class_name",
    "create_backbone",
    "create_clip",
    "load_prompt",
    "name_similarity",
    "save_clip",
    "save_prompt",
]
