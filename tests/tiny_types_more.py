"""More tiny checkpoints: processors that come with a part for videos, rotary positions of a type's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers as tr

from tests.tiny import tiny_tokenizer
from tests.tiny_types import SIZE, TEXT, VISION, finish, seeded, template, text
from trainers.families.processors import without_video

ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
GRID = [[32, 64], [64, 32], [64, 64]]


def still(kind: str, *given: Any, **more: Any) -> Any:
    return without_video(getattr(tr, kind))(*given, **more)


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def llava_onevision(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("<video>")
    tokenizer.chat_template = template("<image>")
    config = tr.LlavaOnevisionConfig(
        vision_config=tr.SiglipVisionConfig(**VISION, vision_use_head=False), text_config=text("Qwen2", tokenizer),
        image_token_index=3, video_token_index=_id(tokenizer, "<video>"), image_grid_pinpoints=GRID,
        tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=GRID)
    processor = still("LlavaOnevisionProcessor", images, tokenizer, None, num_image_tokens=16,
                      vision_feature_select_strategy="full", chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "LlavaOnevisionForConditionalGeneration"), processor, tokenizer)


def llava_next_video(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("<video>")
    tokenizer.chat_template = template("<image>")
    config = tr.LlavaNextVideoConfig(
        vision_config=tr.CLIPVisionConfig(**VISION), text_config=text("Llama", tokenizer), image_token_index=3,
        video_token_index=_id(tokenizer, "<video>"), image_grid_pinpoints=GRID, image_seq_length=16,
        tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.LlavaNextImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE, image_grid_pinpoints=GRID)
    processor = still("LlavaNextVideoProcessor", None, images, tokenizer, patch_size=8, num_additional_image_tokens=1,
                      vision_feature_select_strategy="default", chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "LlavaNextVideoForConditionalGeneration"), processor, tokenizer)


def video_llava(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("<video>")
    tokenizer.chat_template = template("<image>")
    config = tr.VideoLlavaConfig(
        vision_config=tr.CLIPVisionConfig(**VISION), text_config=text("Llama", tokenizer), image_token_index=3,
        video_token_index=_id(tokenizer, "<video>"), image_seq_length=17, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.VideoLlavaImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    processor = still("VideoLlavaProcessor", images, None, tokenizer, patch_size=8, num_additional_image_tokens=1,
                      vision_feature_select_strategy="default", chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "VideoLlavaForConditionalGeneration"), processor, tokenizer)


INTERN = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
          "video_token": "<video>"}  # fmt: skip


def internvl(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(*INTERN.values(), named=INTERN)
    tokenizer.chat_template = template("<IMG_CONTEXT>")
    config = tr.InternVLConfig(
        vision_config=dict(VISION, image_size=[32, 32], patch_size=[8, 8]), text_config=text("Qwen2", tokenizer),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = still("InternVLProcessor", images, tokenizer, None, image_seq_length=4,
                      chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "InternVLForConditionalGeneration"), processor, tokenizer)


def qianfan_ocr(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(*INTERN.values(), named=INTERN)
    tokenizer.chat_template = template("<image>")
    config = tr.QianfanOCRConfig(
        vision_config=dict(VISION, image_size=[32, 32], patch_size=[8, 8]), text_config=text("Qwen3", tokenizer),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"), image_seq_length=4, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = tr.QianfanOCRProcessor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "QianfanOCRForConditionalGeneration"), processor, tokenizer)


PIXTRAL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 64, "patch_size": 8, "head_dim": 8}  # fmt: skip


def mistral3(folder: Path, kind: str = "Mistral3", decoder: str = "Mistral") -> Path:
    tokenizer = tiny_tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer.chat_template = template("[IMG]")
    config = getattr(tr, f"{kind}Config")(
        vision_config=tr.PixtralVisionConfig(**PIXTRAL), text_config=text(decoder, tokenizer),
        image_token_index=_id(tokenizer, "[IMG]"), spatial_merge_size=2, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    processor = tr.PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2,
                                    chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, f"{kind}ForConditionalGeneration"), processor, tokenizer)


def lighton_ocr(folder: Path) -> Path:
    names = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tokenizer = tiny_tokenizer(*names.values(), named=names)
    tokenizer.chat_template = template("<|image_pad|>")
    config = tr.LightOnOcrConfig(
        vision_config=tr.PixtralVisionConfig(**PIXTRAL), text_config=text("Qwen3", tokenizer),
        image_token_id=_id(tokenizer, "<|image_pad|>"), spatial_merge_size=2, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.PixtralImageProcessor(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    processor = tr.LightOnOcrProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2,
                                       chat_template=tokenizer.chat_template)  # fmt: skip
    return finish(folder, seeded(config, "LightOnOcrForConditionalGeneration"), processor, tokenizer)


def ovis2(folder: Path) -> Path:
    names = ["<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tokenizer = tiny_tokenizer(*names, named={"image_token": "<IMG_ATOM>"})
    tokenizer.chat_template = template("<image>")
    ids = [_id(tokenizer, name) for name in names]
    config = tr.Ovis2Config(
        vision_config=dict(VISION, vocab_size=24, hidden_stride=2, num_visual_indicator_tokens=5),
        text_config=text("Qwen2", tokenizer), image_token_id=ids[0], visual_indicator_token_ids=ids[1:],
        vocab_size=len(tokenizer), hidden_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.Ovis2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=4)
    processor = tr.Ovis2Processor(images, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "Ovis2ForConditionalGeneration"), processor, tokenizer)


def janus(folder: Path) -> Path:
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tiny_tokenizer(*names.values(), named=names)
    tokenizer.chat_template = template("<image_placeholder>")
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
              "projection_dim": 32, "num_image_tokens": 16, "depth": 2}  # fmt: skip
    codes = {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 16, "base_channels": 32, "num_patches": 4,
             "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32,
             "image_token_embed_dim": 32}  # fmt: skip
    config = tr.JanusConfig(
        vision_config=vision, vq_config=codes, text_config=text("Llama", tokenizer),
        image_token_id=_id(tokenizer, "<image_placeholder>"), tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.JanusImageProcessor(size=SIZE, min_size=8)
    processor = tr.JanusProcessor(images, tokenizer, num_image_tokens=16, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "JanusForConditionalGeneration"), processor, tokenizer)


def aria(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("<|img|>", named={"image_token": "<|img|>"})
    tokenizer.chat_template = template("<|img|>")
    config = tr.AriaConfig(
        vision_config=dict(VISION, model_type="idefics3_vision", image_size=980, patch_size=98),
        text_config=text("AriaText", tokenizer, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
        image_token_index=_id(tokenizer, "<|img|>"), projector_patch_to_query_dict={25: 4, 100: 8},
        tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.AriaImageProcessor(max_image_size=490, min_image_size=336)
    processor = tr.AriaProcessor(
        images, tokenizer, size_conversion={490: 4, 980: 8}, chat_template=tokenizer.chat_template
    )
    return finish(folder, seeded(config, "AriaForConditionalGeneration"), processor, tokenizer)


PADS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_SIZE = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}


def video_llama_3(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(*PADS.values(), named=PADS)
    tokenizer.chat_template = template("<|image_pad|>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "patch_size": 4}  # fmt: skip
    config = tr.VideoLlama3Config(
        vision_config=vision, text_config=text("Qwen2", tokenizer), image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"), tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.VideoLlama3ImageProcessor(patch_size=4, merge_size=2, size=QWEN_SIZE)
    processor = still("VideoLlama3Processor", images, tokenizer, None, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "VideoLlama3ForConditionalGeneration"), processor, tokenizer)


def glm(folder: Path, kind: str, images: Any, decoder: str, processor: str, **more: Any) -> Path:
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    marks = ["<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"]
    tokenizer = tiny_tokenizer(*names.values(), *marks, named=names)
    tokenizer.chat_template = template("<|begin_of_image|><|image|><|end_of_image|>")
    ids = [_id(tokenizer, mark) for mark in marks]
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "image_size": 32, "patch_size": 4, "out_hidden_size": 32,
              "intermediate_size": 64}  # fmt: skip
    config = getattr(tr, f"{kind}Config")(
        vision_config=vision,
        text_config=text(decoder, tokenizer, rope_parameters=ROPE | {"partial_rotary_factor": 1.0}, **more),
        image_token_id=_id(tokenizer, "<|image|>"), video_token_id=_id(tokenizer, "<|video|>"),
        image_start_token_id=ids[0], image_end_token_id=ids[1], video_start_token_id=ids[2],
        video_end_token_id=ids[3], tie_word_embeddings=True,
    )  # fmt: skip
    made = images(patch_size=4, merge_size=2, size=QWEN_SIZE)
    whole = still(processor, made, tokenizer, None, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, f"{kind}ForConditionalGeneration"), whole, tokenizer)


EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1,
           "first_k_dense_replace": 1}  # fmt: skip


def paddleocr_vl(folder: Path) -> Path:
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    marks = ["<|IMAGE_START|>", "<|IMAGE_END|>"]
    tokenizer = tiny_tokenizer(*names.values(), *marks, named=names)
    tokenizer.chat_template = template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 32, "patch_size": 4}  # fmt: skip
    config = tr.PaddleOCRVLConfig(
        vision_config=vision, text_config=text("PaddleOCRText", tokenizer, rope_parameters=ROPE),
        image_token_id=_id(tokenizer, "<|IMAGE_PLACEHOLDER|>"), video_token_id=len(tokenizer) - 1,
        vision_start_token_id=_id(tokenizer, marks[0]), vision_end_token_id=_id(tokenizer, marks[1]),
        tie_word_embeddings=True,
    ) if hasattr(tr, "PaddleOCRTextConfig") else None  # fmt: skip
    images = tr.PaddleOCRVLImageProcessor(patch_size=4, merge_size=2, size=QWEN_SIZE)
    processor = tr.PaddleOCRVLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "PaddleOCRVLForConditionalGeneration"), processor, tokenizer)


def exaone4_5(folder: Path) -> Path:
    tokenizer = tiny_tokenizer(*PADS.values(), named=PADS)
    tokenizer.chat_template = template("<|image_pad|>")
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_key_value_heads": 2,
              "patch_size": 4, "window_size": 16, "out_hidden_size": 32, "fullatt_block_indexes": [1]}  # fmt: skip
    config = tr.Exaone4_5_Config(
        vision_config=vision, text_config=text("Exaone4", tokenizer, sliding_window=512, sliding_window_pattern=2),
        image_token_id=_id(tokenizer, "<|image_pad|>"), video_token_id=_id(tokenizer, "<|video_pad|>"),
        tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.Qwen2VLImageProcessor(patch_size=4, merge_size=2, size=QWEN_SIZE)
    processor = still("Exaone4_5_Processor", images, tokenizer, None, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "Exaone4_5_ForConditionalGeneration"), processor, tokenizer)


def ernie4_5_vl_moe(folder: Path) -> Path:
    names = {"image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>",
             "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO|>", "video_start_token": "<|VIDEO_START|>",
             "video_end_token": "<|VIDEO_END|>"}  # fmt: skip
    tokenizer = tiny_tokenizer(*names.values(), named=names)
    tokenizer.chat_template = template("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "intermediate_size": 64}
    given = {name + "_id": _id(tokenizer, token) for name, token in names.items()}
    config = tr.Ernie4_5_VLMoeConfig(
        vision_config=vision, tie_word_embeddings=True, **given,
        text_config=text("Ernie4_5_VLMoeText", tokenizer, rope_parameters=ROPE, moe_intermediate_size=[16, 16],
                         moe_k=2, moe_num_experts=4, moe_num_shared_experts=1, mlp_layer_types=["sparse", "sparse"]),
    )  # fmt: skip
    images = tr.Ernie4_5_VLMoeImageProcessor(patch_size=4, merge_size=2, size=QWEN_SIZE)
    processor = still("Ernie4_5_VLMoeProcessor", images, tokenizer, None, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "Ernie4_5_VLMoeForConditionalGeneration"), processor, tokenizer)


def chameleon(folder: Path) -> Path:
    names = {"image_token": "<image>", "boi_token": "<racm3:break>", "eoi_token": "<eoss>"}
    codes = [f"IMGIMG{index}Z" for index in "ABCDEFGH"]
    tokenizer = tiny_tokenizer("<racm3:break>", "<eoss>", *codes, named=names)
    tokenizer.chat_template = template("<image>")
    vq = {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 32, "base_channels": 32,
          "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1}  # fmt: skip
    given = {key: value for key, value in TEXT.items() if key != "head_dim"}
    config = tr.ChameleonConfig(
        vq_config=vq, vocabulary_map=dict(tokenizer.get_vocab()),
        vocab_size=len(tokenizer), tie_word_embeddings=True, **given,
    )  # fmt: skip
    images = tr.ChameleonImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    processor = tr.ChameleonProcessor(images, tokenizer, image_seq_length=16)
    return finish(folder, seeded(config, "ChameleonForConditionalGeneration"), processor, tokenizer)


def hunyuan_vl(folder: Path) -> Path:
    names = {"image_token": "<img>", "image_start_token": "<imgs>", "image_end_token": "<imge>"}
    tokenizer = tiny_tokenizer(*names.values(), "<nl>", named=names)
    tokenizer.chat_template = template("<imgs><img><imge>")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "out_hidden_size": 32, "text_hidden_size": 32, "patch_size": 4, "max_image_size": 64,
              "img_max_token_num": 64, "min_image_size": 16}  # fmt: skip
    config = tr.HunYuanVLConfig(
        vision_config=vision,
        text_config=text("HunYuanVLText", tokenizer, rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "xdrope_section": [1, 1, 1, 1]}),
        image_token_id=_id(tokenizer, "<img>"), im_start_id=_id(tokenizer, "<imgs>"),
        im_end_id=_id(tokenizer, "<imge>"), im_newline_id=_id(tokenizer, "<nl>"), tie_word_embeddings=True,
    )  # fmt: skip
    images = tr.HunYuanVLImageProcessor(patch_size=4, merge_size=2, size=QWEN_SIZE)
    processor = tr.HunYuanVLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    return finish(folder, seeded(config, "HunYuanVLForConditionalGeneration"), processor, tokenizer)


MORE: dict[str, Callable[[Path], Path]] = {
    "llava_onevision": llava_onevision, "llava_next_video": llava_next_video, "video_llava": video_llava,
    "internvl": internvl, "qianfan_ocr": qianfan_ocr, "lighton_ocr": lighton_ocr, "janus": janus, "aria": aria,
    "video_llama_3": video_llama_3,
    "glm4v": lambda f: glm(f, "Glm4v", tr.Glm4vImageProcessor, "Glm4vText", "Glm4vProcessor"),
    "glm4v_moe": lambda f: glm(f, "Glm4vMoe", tr.Glm4vImageProcessor, "Glm4vMoeText", "Glm4vProcessor", **EXPERTS),
    "glm46v": lambda f: glm(f, "Glm46V", tr.Glm46VImageProcessor, "Glm4vText", "Glm46VProcessor"),
    "glm_ocr": lambda f: glm(f, "GlmOcr", tr.Glm46VImageProcessor, "GlmOcrText", "Glm46VProcessor"),
    "paddleocr_vl": paddleocr_vl, "exaone4_5": exaone4_5, "hunyuan_vl": hunyuan_vl,
}  # fmt: skip
# What the check at loading must refuse, and in which words.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "ovis2": (ovis2, "its answers differ from its own forward pass by"),
    "chameleon": (chameleon, "its processor writes the prompt in a way that is not understood"),
    "ernie4_5_vl_moe": (ernie4_5_vl_moe, "its answers differ from its own forward pass by"),
}  # fmt: skip
