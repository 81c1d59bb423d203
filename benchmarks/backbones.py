"""Which backbones of KerasHub `explain.capture` reads: writes backbones.json, which a page of the site shows.

Every public backbone class of the installed keras-hub is made with a tiny configuration and random weights, and run on
random inputs. How many times a model attends is counted in its program for JAX, without this package and without
knowing any class: see `attention_calls`.

    python benchmarks/backbones.py                     # all backends, in processes of their own; writes the file
    python benchmarks/backbones.py --backend torch --renew    # one of them, here in a minute; the others stay
    python benchmarks/backbones.py --backend jax --only "BertBackbone;LlamaBackbone"    # prints a line for each
    python benchmarks/backbones.py --backend jax --only "BertBackbone;LlamaBackbone" --renew    # into the file
"""

import argparse
import importlib.metadata
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

BACKENDS = {"torch": "PyTorch", "jax": "JAX", "tensorflow": "TensorFlow"}
# One of each way in which KerasHub attends: for the tests on the backends that take long.
SELECTION = (
    "BertBackbone",
    "GPT2Backbone, no dropout",
    "GemmaBackbone",
    "GptOssBackbone",
    "LlamaBackbone",
    "SwinTransformerBackbone",
    "T5Backbone",
    "WhisperBackbone",
    "XLNetBackbone",
)

TOKENS, IMAGE, VOCABULARY = 8, (32, 32, 3), 32
# For every argument of these names that has no default, in any class.
REQUIRED = {
    **dict.fromkeys(("vocabulary_size", "vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_layers", "num_layers_enc", "num_layers_dec", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_num_layers", "decoder_num_layers"), 2),
    **dict.fromkeys(("num_heads", "num_query_heads", "num_attention_heads", "num_decoder_heads"), 2),
    **dict.fromkeys(("encoder_num_heads", "decoder_num_heads"), 2),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads"), 1),
    **dict.fromkeys(("hidden_dim", "hidden_size", "embedding_dim", "decoder_hidden_dim", "encoder_hidden_dim"), 16),
    **dict.fromkeys(("intermediate_dim", "mlp_dim", "decoder_mlp_dim", "filter_dim", "projection_dim"), 16),
    **dict.fromkeys(("encoder_intermediate_dim", "decoder_intermediate_dim", "moe_intermediate_dim"), 16),
    **dict.fromkeys(("shared_expert_intermediate_dim", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("head_dim", "head_size", "encoder_head_dim", "decoder_head_dim", "patch_size"), 8),
    **dict.fromkeys(("encoder_layer_types", "decoder_layer_types"), ["full_attention"] * 2),
    "num_experts": 4,
    "top_k": 2,
    "image_shape": IMAGE,
    "image_size": IMAGE[0],
}
# For every argument of these names, whether or not it has a default. Dropout and the like stay what they are.
OPTIONAL = {"image_shape": IMAGE, "max_sequence_length": TOKENS}


def _clip(family, part):
    return lambda: {
        "vision_encoder": backbone(f"{family}VisionEncoder"),
        "text_encoder": backbone(f"{family}TextEncoder"),
        **part,
    }


def _blip2():
    from keras_hub import models

    dim = {"hidden_dim": 16, "intermediate_dim": 16, "num_layers": 2, "num_heads": 2}
    return {
        "vision_encoder": models.BLIP2VisionEncoder(
            image_size=32, patch_size=8, use_patch_bias=True, use_class_token=True, use_mha_bias=True,
            use_mlp_bias=True, dropout_rate=0.0, layer_norm_epsilon=1e-6, initializer_range=0.02, **dim,
        ),
        "qformer": models.BLIP2QFormer(
            num_query_tokens=4, vision_dim=16, cross_attention_frequency=2, dropout=0.1, layer_norm_epsilon=1e-6, **dim
        ),
        "language_model": models.BLIP2CustomOPT(
            vocabulary_size=VOCABULARY, num_query_tokens=4, dropout=0.0, max_sequence_length=16,
            qformer_hidden_dim=16, **dim,
        ),
    }  # fmt: skip


def _d_fine():
    stages = {
        "stackwise_stage_filters": [[8, 8, 16, 1, 1, 3], [16, 8, 16, 1, 1, 3]],
        "apply_downsample": [False, True],
        "use_lightweight_conv_block": [False, False],
        "depths": [1, 1],
        "hidden_sizes": [16, 16],
    }
    return {
        "backbone": backbone("HGNetV2Backbone", **stages),
        "decoder_in_channels": [16, 16],
        "encoder_in_channels": [16, 16],
        "encode_proj_layers": [1],
        "feat_strides": [4, 8],
        "num_feature_levels": 2,
        "decoder_n_points": [2, 2],
        "num_labels": 4,
        "num_denoising": 0,
        "learn_initial_query": False,
        "num_queries": 6,
        "anchor_image_size": IMAGE[:2],
        "encoder_ffn_dim": 16,
        "num_encoder_layers": 1,
        "hidden_expansion": 1.0,
        "depth_multiplier": 0.34,
        "eval_idx": -1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "lqe_hidden_dim": 8,
        "num_lqe_layers": 2,
        "seed": 0,
    }


def _sam():
    from keras_hub import layers

    return {
        "image_encoder": backbone("ViTDetBackbone", num_output_channels=16),
        "prompt_encoder": layers.SAMPromptEncoder(
            hidden_size=16, image_embedding_size=(4, 4), input_image_size=IMAGE[:2], mask_in_channels=4
        ),
        "mask_decoder": layers.SAMMaskDecoder(
            num_layers=1, hidden_size=16, intermediate_dim=16, num_heads=2, embedding_dim=16,
            num_multimask_outputs=1, iou_head_depth=1, iou_head_hidden_dim=8,
        ),
    }  # fmt: skip


def _sam3():
    from keras_hub import layers

    dim = {"hidden_dim": 32, "intermediate_dim": 16, "num_heads": 2}
    image = {"image_shape": (64, 64, 3), "patch_size": 8}
    return {
        "vision_encoder": layers.SAM3VisionEncoder(
            num_layers=2, fpn_hidden_dim=32, fpn_scale_factors=[4.0, 2.0, 1.0, 0.5], window_size=4,
            pretrain_image_shape=(32, 32, 3), global_attn_indexes=[1], **image, **dim,
        ),
        "text_encoder": layers.SAM3TextEncoder(vocabulary_size=VOCABULARY, embedding_dim=32, num_layers=1, **dim),
        "geometry_encoder": layers.SAM3GeometryEncoder(num_layers=1, roi_size=2, **dim),
        "detr_encoder": layers.SAM3DetrEncoder(num_layers=1, **dim),
        "detr_decoder": layers.SAM3DetrDecoder(num_layers=1, num_queries=4, **image, **dim),
        "mask_decoder": layers.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=32, num_heads=2),
    }  # fmt: skip


def _stable_diffusion_3():
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone  # the one part that is not public

    clip = {"intermediate_output_index": 0}
    return {
        "mmdit_patch_size": 2,
        "mmdit_hidden_dim": 16,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 16,
        "mmdit_qk_norm": None,
        "mmdit_dual_attention_indices": None,
        "latent_channels": 4,
        "vae": VAEBackbone([32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode", sample_channels=8),
        "clip_l": backbone("CLIPTextEncoder", name="clip_l", **clip),
        "clip_g": backbone("CLIPTextEncoder", name="clip_g", **clip),
    }


def _mobilenet_v5():
    """A convolution and an attention block of each kind."""
    blocks = ["er", "mqa", "mha"]
    none, kernel = [0] * 3, [3] * 3
    return {
        "stackwise_block_types": [blocks],
        "stackwise_num_blocks": [3],
        "stackwise_num_filters": [[16] * 3],
        "stackwise_strides": [[2, 1, 1]],
        "stackwise_act_layers": [["relu"] * 3],
        "stackwise_exp_ratios": [[2.0] * 3],
        "stackwise_se_ratios": [[0.0] * 3],
        "stackwise_dw_kernel_sizes": [kernel],
        "stackwise_dw_start_kernel_sizes": [none],
        "stackwise_dw_end_kernel_sizes": [none],
        "stackwise_exp_kernel_sizes": [kernel],
        "stackwise_pw_kernel_sizes": [[1] * 3],
        "stackwise_num_heads": [[0, 2, 2]],
        "stackwise_key_dims": [[0, 8, 8]],
        "stackwise_value_dims": [[0, 8, 8]],
        "stackwise_kv_strides": [[0, 1, 1]],
        "stackwise_use_cpe": [[False] * 3],
        "use_msfa": False,
    }


_RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [3],
    "stackwise_num_filters": [64] * 4,  # the stem and the first stack have to be 64
    "stackwise_num_blocks": [1] * 4,
    "stackwise_num_strides": [1, 2, 2, 2],
    "block_type": "basic_block",
}
_SMOL = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, False],
    "layer_types": ["attention"] * 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 16,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "partial_rotary_factor": 0.5,
}
# What else a class needs. A function, where that has models or layers in it.
OWN = {
    "BASNetBackbone": lambda: {
        "image_encoder": backbone("ResNetBackbone", image_shape=(None, None, 3)),  # it sets the shape
        "num_classes": 1,
        "projection_filters": 64,
    },
    "BLIP2Backbone": _blip2,
    "CLIPBackbone": _clip("CLIP", {"projection_dim": 8}),
    "CSPNetBackbone": {
        "stem_filters": 8,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 1],
        "stackwise_strides": [1, 2],
        "stackwise_num_filters": [8, 8],
        "block_type": "dark_block",
        "stage_type": "dark",
    },
    "DFineBackbone": _d_fine,
    "DINOV2Backbone": {"position_embedding_shape": IMAGE},
    "DeepLabV3Backbone": lambda: {
        "image_encoder": backbone("ResNetBackbone"),
        "spatial_pyramid_pooling_key": "P3",
        "low_level_feature_key": "P2",
        "upsampling_size": 2,
        "dilation_rates": [1, 2],
        "projection_filters": 8,
    },
    "DenseNetBackbone": {"stackwise_num_repeats": [1, 1], "growth_rate": 4},
    "DepthAnythingBackbone": lambda: {
        "image_encoder": backbone("DINOV2Backbone"),
        "reassemble_factors": [2, 1],
        "neck_hidden_dims": [8, 8],
        "fusion_hidden_dim": 8,
        "head_hidden_dim": 8,
        "head_in_index": -1,
        "feature_keys": ["stage1", "stage2"],
    },
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3],
        "stackwise_num_repeats": [1],
        "stackwise_input_filters": [8],
        "stackwise_output_filters": [8],
        "stackwise_expansion_ratios": [2],
        "stackwise_squeeze_and_excite_ratios": [0.25],
        "stackwise_strides": [1],
        "stackwise_block_types": ["v1"],
        "stackwise_width_coefficients": [1.0],
        "stackwise_depth_coefficients": [1.0],
        "num_features": 16,
    },
    "FluxBackbone": {
        "input_channels": 4,
        "mlp_ratio": 2.0,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [2, 2, 4],
        "theta": 10_000,
        "use_bias": True,
        "image_shape": (9, 4),
        "text_shape": (TOKENS, 4),
        "image_ids_shape": (9, 3),
        "text_ids_shape": (TOKENS, 3),
        "y_shape": (8,),
    },
    "Gemma3nBackbone": {
        "text_vocab_size": VOCABULARY,
        "text_hidden_size": 16,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "intermediate_size": [16, 16],
        "hidden_activation": "gelu_approximate",
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 4,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 4,
        "altup_num_inputs": 2,
        "laurel_rank": 2,
    },
    "HGNetV2Backbone": {
        "depths": [1],
        "embedding_size": 8,
        "hidden_sizes": [16],
        "stem_channels": [3, 8, 8],
        "hidden_act": "relu",
        "use_learnable_affine_block": False,
        "stackwise_stage_filters": [[8, 8, 16, 1, 1, 3]],
        "apply_downsample": [False],
        "use_lightweight_conv_block": [False],
    },
    "MetaCLIP2Backbone": _clip("MetaCLIP2", {"projection_dim": 8}),
    "MiTBackbone": {
        "layerwise_depths": [1, 1],
        "layerwise_num_heads": [1, 2],
        "layerwise_sr_ratios": [2, 1],
        "layerwise_patch_sizes": [3, 3],
        "layerwise_strides": [4, 2],
        "max_drop_path_rate": 0.1,
        "hidden_dims": [8, 16],
    },
    "MobileNetBackbone": {
        "stackwise_expansion": [[8]],
        "stackwise_num_blocks": [1],
        "stackwise_num_filters": [[8]],
        "stackwise_kernel_size": [[3]],
        "stackwise_num_strides": [[2]],
        "stackwise_se_ratio": [[0.25]],
        "stackwise_activation": [["relu"]],
        "stackwise_padding": [[1]],
        "output_num_filters": 8,
        "depthwise_filters": 8,
        "depthwise_stride": 1,
        "depthwise_residual": False,
        "last_layer_filter": 8,
    },
    "MobileNetV5Backbone": _mobilenet_v5,
    "PARSeqBackbone": lambda: {"image_encoder": backbone("ViTBackbone"), "max_label_length": 16},
    "PaliGemmaBackbone": {
        "vit_patch_size": 8,
        "vit_num_heads": 2,
        "vit_hidden_dim": 16,
        "vit_num_layers": 2,
        "vit_intermediate_dim": 16,
    },
    "Qwen3_5Backbone": _LINEAR,
    "Qwen3_5MoeBackbone": _LINEAR,
    "RWKV7Backbone": dict.fromkeys(("gate_lora", "mv_lora", "aaa_lora", "decay_lora"), 8),
    "ResNetBackbone": _RESNET,
    "RetinaNetBackbone": lambda: {
        "image_encoder": backbone("ResNetBackbone"),
        "min_level": 3,
        "max_level": 5,
        "use_p5": True,
    },
    "SAM3PromptableConceptBackbone": _sam3,
    "SAMBackbone": _sam,
    "SegFormerBackbone": lambda: {"image_encoder": backbone("MiTBackbone"), "projection_filters": 8},
    "SigLIPBackbone": _clip("SigLIP", {}),
    "SmolLM3Backbone": _SMOL,
    "StableDiffusion3Backbone": _stable_diffusion_3,
    "SwinTransformerBackbone": {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
    "VGGBackbone": {"stackwise_num_repeats": [1, 1], "stackwise_num_filters": [8, 8]},
    "ViTDetBackbone": {
        "global_attention_layer_indices": [1],
        "num_output_channels": 8,
        "window_size": 2,
        "patch_size": 8,
    },
    "VideoPrismBackbone": {
        "num_frames": 2,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 1,
        "vocabulary_size": VOCABULARY,
        "num_text_layers": 1,
    },
    "WhisperBackbone": {"num_mels": 8, "max_encoder_sequence_length": 16, "max_decoder_sequence_length": 16},
    "XceptionBackbone": {"stackwise_conv_filters": [[8, 8], [8, 8]], "stackwise_pooling": [True, False]},
}


def classes():
    """The public backbone classes, by name; what several names stand for, by its own. All but what is abstract."""
    from keras_hub import models

    public = {value for value in vars(models).values() if inspect.isclass(value) and issubclass(value, models.Backbone)}
    abstract = {models.Backbone, models.FeaturePyramidBackbone}
    return {one.__name__: one for one in sorted(public - abstract, key=lambda one: one.__name__)}


def aliases():
    """From the name of a class to other public names that it has."""
    from keras_hub import models

    names = {
        one: {name for name, value in vars(models).items() if value is one_class}
        for one, one_class in classes().items()
    }
    return {one: of - {one} for one, of in names.items() if of - {one}}


def backbone(class_name, **arguments):
    """A backbone with a tiny configuration."""
    one = classes()[class_name]
    parameters = inspect.signature(one.__init__).parameters
    own = OWN.get(class_name, {})
    small = {
        parameter: REQUIRED[parameter]
        for parameter, details in parameters.items()
        if parameter in REQUIRED and details.default is inspect.Parameter.empty
    }
    small |= {parameter: value for parameter, value in OPTIONAL.items() if parameter in parameters}
    model = one(**small | (own() if callable(own) else own) | arguments)
    if class_name == "StableDiffusion3Backbone":
        model.configure_scheduler(VALUES["num_steps"])  # it has to be told before it is compiled
    return model


NO_DROPOUT = ", no dropout"


def rows():
    """What is measured: each class with what it has by default, and those that drop something by then, without that.

    It decides in some of KerasHub's layers how they attend: what has a dropout cannot use a fused kernel.
    """
    names = []
    for name, one in classes().items():
        names.append(name)
        if _dropouts(one):
            names.append(name + NO_DROPOUT)
    return names


def _dropouts(one):
    parameters = inspect.signature(one.__init__).parameters
    wanted = ("dropout", "dropout_rate", "attention_dropout")
    return {name: 0.0 for name in wanted if name in parameters and parameters[name].default not in (0, 0.0)}


def model_of(row):
    """The model of a row of the table."""
    name = row.removesuffix(NO_DROPOUT)
    return backbone(name, **(_dropouts(classes()[name]) if row != name else {}))


# By the name of the input: how long the axes are that the model leaves open, where that is not the same for all, and
# values that cannot be random.
LENGTHS = {"encoder_features": [16], "encoder_input_values": [1024], "masks": [0, 16, 16], "boxes": [1], "points": [1]}
LENGTHS |= {"labels": [1], "box_labels": [1]}
VALUES = {"num_steps": 2, "timesteps": 1, "labels": 1, "box_labels": 1}


def inputs(model):
    """Two random samples of what the model reads; the second one is padded at its end."""
    import keras
    import numpy as np

    generator = np.random.default_rng(0)

    def of(spec):
        name, shape = spec.name.partition(":")[0], list(spec.shape[1:])
        lengths = iter(LENGTHS.get(name, IMAGE[:2] if len(shape) == 3 else [TOKENS]))
        shape = (2, *[next(lengths) if size is None else size for size in shape])
        if name in VALUES:
            return np.full(shape, VALUES[name], spec.dtype)
        if "mask" in name:
            mask = np.ones(shape, spec.dtype)
            mask[1, -2:] = 0
            return mask
        if spec.dtype.startswith("int"):
            return generator.integers(1, 2 if "segment" in name else VOCABULARY, shape).astype(spec.dtype)
        return generator.normal(size=shape).astype(spec.dtype)

    return keras.tree.map_structure(of, model.input)


def attention_calls(model, x):
    """How often the model attends in a forward pass: in all, and how often to something that is no value of the data.

    It is read off the program that JAX makes of the model, in which nothing is fused and no name of Keras is left. A
    softmax is an exponential divided by its own sum along an axis. It is attention if it, or what is made of it
    entry by entry, is then contracted along that axis with something that depends on the data: with a mixture of
    experts or a gate, it is not contracted, and the bins of a box regression are contracted with constants.
    """
    import jax
    import keras
    import numpy as np

    def forward(trainable, non_trainable, x):
        return model.stateless_call(trainable, non_trainable, x, training=False)[0]

    values = [[variable.value for variable in of] for of in (model.trainable_variables, model.non_trainable_variables)]
    program = jax.make_jaxpr(forward)(*values, keras.tree.map_structure(np.asarray, x)).jaxpr
    count = sum(map(len, values))
    walk = _Walk()
    walk.through(program, [{"made": number >= count} for number in range(len(program.invars))])
    return len(walk.attention)


class _Walk:
    """Through a JAX program, with what is known of each of its arrays.

    `data`: whether it depends on the data; `exp`: from an exponential, with its number; `sum`: the sum over which
    axes of which exponential; `softmax`: of which number, and along which axis by now.
    """

    SAME = frozenset(
        {
            *("add", "sub", "mul", "div", "neg", "max", "min", "clamp", "and", "or", "select_n"),
            *("convert_element_type", "reduce_precision", "copy", "stop_gradient", "optimization_barrier"),
            *("pad", "slice", "dynamic_slice", "concatenate"),
        }
    )

    def __init__(self):
        self.attention = set()
        self.numbers = 0

    def through(self, program, known):
        """The knowledge of what the program returns."""
        of = dict(zip(program.invars, known, strict=True))

        def knowledge(variable):
            return {} if hasattr(variable, "val") else of.get(variable, {})

        for equation in program.eqns:
            before = [knowledge(variable) for variable in equation.invars]
            for variable, after in zip(equation.outvars, self._after(equation, before), strict=True):
                of[variable] = after
        return [knowledge(variable) for variable in program.outvars]

    def _after(self, equation, before):
        inner = self._inner(equation, before)
        if inner is not None:
            return inner
        name = equation.primitive.name
        after = {"made": name in ("dot_general", "conv_general_dilated") or any(entry.get("made") for entry in before)}
        if name in ("exp", "exp2"):
            self.numbers += 1
            after |= {"exp": self.numbers}
        elif name == "reduce_sum" and "exp" in before[0]:
            after |= {"sum": (before[0]["exp"], equation.params["axes"])}
        elif name == "div" and "exp" in before[0] and before[0]["exp"] == before[1].get("sum", (None,))[0]:
            after |= {"softmax": (before[0]["exp"], before[1]["sum"][1][0])}
        elif name == "dot_general":
            self._contract(equation, before)
        else:
            after |= self._moved(equation, before)
        return [after] * len(equation.outvars)

    def _contract(self, equation, before):
        contracted = equation.params["dimension_numbers"][0]
        for entry, axes, other in zip(before, contracted, before[::-1], strict=True):
            if "softmax" in entry and entry["softmax"][1] in axes and other.get("made"):
                self.attention.add(entry["softmax"][0])

    def _moved(self, equation, before):
        """What stays known after an operation on each entry, or one that only moves entries."""
        name, shape = equation.primitive.name, equation.outvars[0].aval.shape
        kept = {}
        for variable, entry in zip(equation.invars, before, strict=True):
            if name in self.SAME and len(variable.aval.shape) == len(shape):
                kept |= {key: entry[key] for key in ("softmax", "exp", "sum") if key in entry}
            elif name in ("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "transpose"):
                kept |= {key: entry[key] for key in ("exp", "sum") if key in entry}
                axis = (
                    _axis_after(equation, variable.aval.shape, shape, entry["softmax"][1])
                    if "softmax" in entry
                    else None
                )
                if axis is not None:
                    kept["softmax"] = (entry["softmax"][0], axis)
        return kept

    def _inner(self, equation, before):
        """The knowledge after a call of another program, a loop or a condition; `None` if it is none."""
        name, params = equation.primitive.name, equation.params
        if name == "cond":
            results = [self.through(branch.jaxpr, before[1:]) for branch in params["branches"]]
            return [
                {key: value for of in options for key, value in of.items()} for options in zip(*results, strict=True)
            ]
        if name == "while":
            first = params["cond_nconsts"]
            return self.through(params["body_jaxpr"].jaxpr, [{"made": entry.get("made")} for entry in before[first:]])
        program = params.get("jaxpr") or params.get("call_jaxpr") or params.get("fun_jaxpr")
        if program is None:
            return None
        program = getattr(program, "jaxpr", program)
        known = [{"made": entry.get("made")} for entry in before] if name == "scan" else before
        return self.through(program, known[len(known) - len(program.invars) :])


def _axis_after(equation, before, after, axis):
    """Where an axis is after an operation that moves entries; `None` if it is merged with another."""
    import math

    name, params = equation.primitive.name, equation.params
    if name == "transpose":
        return params["permutation"].index(axis)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][axis]
    ahead = math.prod(before[:axis])
    places = [
        place for place in range(len(after)) if math.prod(after[:place]) == ahead and after[place] == before[axis]
    ]
    return places[-1] if places else None


def measure(model):
    """What `capture` makes of a backbone: what is in the result, what it says of the rest, and how exact it is."""
    import numpy as np

    from kerasfactory import explain

    x = inputs(model)
    before = _flat(model.predict(x, verbose=0))
    scores, errors = {}, {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            scores = explain.capture(model, x, verbose=0)
            errors = explain.recomposition_error(model, x, verbose=0)
        except Exception as error:  # whatever it is, the table shows it
            said = [str(error)] if isinstance(error, ValueError) else [f"{type(error).__name__}: {error}"]
        else:
            said = [str(one.message) for one in warned if one.filename != "" and _is_ours(str(one.message))]
    equal = all(
        np.array_equal(*pair, equal_nan=True) for pair in zip(before, _flat(model.predict(x, verbose=0)), strict=True)
    )
    return {
        "captured": len(scores),
        "error": max(errors.values(), default=None),
        "difference": max((one.attrs["prediction_difference"] for one in scores.values()), default=None),
        "unchanged": equal,
        "said": sorted({reason for text in said for reason in _reasons(text)}),
    }


def _flat(outputs):
    import keras

    return keras.tree.flatten(outputs)


def _is_ours(text):
    return text.startswith(
        ("These layers are not captured", "The model's outputs for the first batch", "The scores of")
    )


def _reasons(text):
    """What a message says of layers, without their names; of a model without attention it says nothing of any."""
    if text.startswith("The model has no attention"):
        return []
    return [line.strip().partition(": ")[2] for line in text.splitlines() if line.startswith("  ")] or [text]


def result_of(attention, captured, said):
    """In a word. What is named with a reason is no silence, and no false alarm if no softmax was to be seen there."""
    if captured > attention:
        return "false alarm"
    if captured < attention and not said:
        return "silent"
    if not said:
        return "complete" if attention else "no attention"
    return "part" if captured else "none"


def _cause(error):
    """What went wrong, without what Keras puts around it, once for each layer that the error came through."""
    *around, innermost = re.sub(r"\x1b\[\d+m", "", str(error)).split("Exception encountered when calling ")
    lines = [line for line in innermost.splitlines() if line]
    return f"{type(error).__name__}: {lines[1 if around else 0]}"[:200]


def in_a_process(backend, *arguments):
    """From each row to what this script prints of it."""
    settings = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    settings |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "OMP_NUM_THREADS": "1"}  # it compiles much and computes little
    command = [sys.executable, __file__, "--backend", backend, *arguments]
    child = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]
    return {line.pop("row"): line for line in lines}


def write(backend=None, only=None):
    """Measures everything; or `only` these rows, on one backend, and leaves in the file what it says of the others."""
    import keras_hub

    path = Path(__file__).with_suffix(".json")
    old = {row["row"]: row for row in json.loads(path.read_text())["rows"]} if backend else {}
    measured = {
        run: in_a_process(one, *(["--only", only] if only else []))
        for one, run in BACKENDS.items()
        if backend in (None, one)
    }
    new = [row for row in rows() if row not in old]
    counted = old | (in_a_process("jax", "--count", "--only", ";".join(new)) if new else {})
    found = []
    for row in rows():
        attention = counted[row]["attention"]
        results = old[row]["results"] if row in old else {}
        results |= {run: by_row[row] for run, by_row in measured.items() if row in by_row}
        for result in results.values():
            if "captured" in result:
                result["result"] = result_of(attention, result["captured"], result["said"])
        found.append({"row": row, "attention": attention, "results": results})
    names = ("keras", "tensorflow", "jax", "torch", "numpy")
    versions = {"keras-hub": keras_hub.__version__} | {name: importlib.metadata.version(name) for name in names}
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    also = {one: sorted(names) for one, names in aliases().items()}
    result = {"machine": machine, "versions": versions, "also": also, "rows": found}
    path.write_text(json.dumps(result, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=list(BACKENDS), help="measure on this one only, and write nothing")
    parser.add_argument("--only", help="rows, with semicolons between them")
    parser.add_argument("--count", action="store_true", help="count how often each attends; on JAX")
    parser.add_argument("--renew", action="store_true", help="write what is measured into the file")
    arguments = parser.parse_args()
    if arguments.backend is None or arguments.renew:
        write(arguments.backend, arguments.only)
        return
    os.environ["KERAS_BACKEND"] = arguments.backend
    for row in arguments.only.split(";") if arguments.only else rows():
        start = time.perf_counter()
        try:
            model = model_of(row)
            found = {"attention": attention_calls(model, inputs(model))} if arguments.count else measure(model)
        except Exception as error:  # as where a package is missing that the class wants
            found = {"failed": _cause(error)}
        found["seconds"] = round(time.perf_counter() - start, 2)
        print(json.dumps({"row": row, **found}), flush=True)


if __name__ == "__main__":
    main()
