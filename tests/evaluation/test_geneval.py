"""GenEval's rules in closed form, and its judge on tiny random networks."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from fewstep.backbones import miniature
from fewstep.cli.extra import extra_of
from fewstep.core.guidance import Guidance
from fewstep.evaluation import detector, geneval_judge
from fewstep.evaluation.detector import Segmenter, detections, detector_pixels, load_detector, restored
from fewstep.evaluation.geneval import (
    COLOURS,
    NAMES,
    SURE,
    Box,
    Clause,
    Detection,
    Rule,
    counted,
    fulfils,
    places,
    read_rules,
)
from fewstep.evaluation.geneval_judge import GenEvalScorer, Judge, cut_out, load_judge
from fewstep.evaluation.images import ImageProtocol, evaluate_images
from fewstep.evaluation.metrics import METRICS
from fewstep.evaluation.prompt_lists import LISTS, shipped_prompts
from fewstep.evaluation.protocols import Row
from fewstep.evaluation.scorer import TASKS, Extra, require_list
from fewstep.evaluation.weights import PLACE, Weights

UNIT: Box = (0.0, 0.0, 10.0, 10.0)


def one(name: str, score: float = 0.95, box: Box = UNIT) -> Detection:
    return Detection(name, score, box)


def moved(x: float, y: float) -> Box:
    return (x, y, x + 10, y + 10)


def right(found: Sequence[Detection], rule: Rule, colours: dict[Box, str] | None = None) -> bool:
    def named(group: Sequence[Detection]) -> list[str]:
        return [(colours or {})[one.box] for one in group]

    return fulfils(counted(found, rule), rule, named)


def test_the_rules_are_those_of_the_lists_prompts() -> None:
    rules = read_rules()
    known = next(known for known in LISTS if known.name == "geneval")
    assert set(rules) == set(shipped_prompts(known)) and set(TASKS) == {rule.task for rule in rules.values()}
    assert Counter(rule.task for rule in rules.values()) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    clauses = [clause for rule in rules.values() for clause in (*rule.include, *rule.exclude)]
    assert {clause.name for clause in clauses} <= set(NAMES) and len(set(NAMES)) == 80
    assert {clause.colour for clause in clauses} == {"", *COLOURS}
    assert rules["a photo of a tie above a sink"].include == (Clause("sink", 1), Clause("tie", 1, place="above", of=0))
    assert rules["a photo of two wine glasses"].exclude == (Clause("wine glass", 3),)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (20, 0, {"right of"}),
        (-20, 0, {"left of"}),
        (0, 20, {"below"}),
        (0, -20, {"above"}),
        (20, 20, {"right of", "below"}),  # each 0.64 of the distance
        (2, 0, set()),  # 0.1 of both widths is 2: still at one place
        (2.5, 0, set()),  # 0.5 of 2.5 is left: 0.2 of the distance
        (4, 0, set()),  # 0.5 of the distance is not more than 0.5
        (4.1, 0, {"right of"}),
        (0, 0, set()),
    ],
)
def test_places_are_distances_less_a_tenth_of_both_sizes(x: float, y: float, expected: set[str]) -> None:
    assert places(moved(x, y), UNIT) == expected
    mirrored = {"right of": "left of", "left of": "right of", "above": "below", "below": "above"}
    assert places(UNIT, moved(x, y)) == {mirrored[name] for name in expected}


def test_only_sure_objects_count_and_surer_ones_where_they_are_counted() -> None:
    rule, counting = Rule("single_object", ()), Rule("counting", ())
    found = [one("dog", 0.3), one("dog", 0.31), one("dog", 0.9), one("cat", 0.91)]
    assert [d.score for d in counted(found, rule)["dog"]] == [0.9, 0.31]
    assert set(counted(found, counting)) == {"cat"}
    assert len(counted([one("dog")] * 20, rule)["dog"]) == 16


def test_objects_and_numbers() -> None:
    single = Rule("single_object", (Clause("dog", 1),))
    assert right([one("dog"), one("cat")], single) and not right([one("cat")], single) and not right([], single)
    two = Rule("two_object", (Clause("dog", 1), Clause("cat", 1)))
    assert right([one("dog"), one("cat")], two) and not right([one("dog")], two)
    three = Rule("counting", (Clause("dog", 3),), (Clause("dog", 4),))
    assert [right([one("dog")] * n, three) for n in (2, 3, 4)] == [False, True, False]
    assert right([one("dog")] * 3 + [one("dog", 0.89)], three)  # an unsure one is not counted


def test_colours_are_those_of_the_surest_objects() -> None:
    colour = Rule("colors", (Clause("dog", 1, "red"),))
    first, second = one("dog", 0.9, moved(0, 0)), one("dog", 0.8, moved(30, 0))
    assert right([second, first], colour, {first.box: "red", second.box: "blue"})
    assert not right([second, first], colour, {first.box: "blue", second.box: "red"})
    both = Rule("color_attr", (Clause("dog", 1, "red"), Clause("cat", 1, "blue")))
    cat = one("cat", 0.9, moved(60, 0))
    assert right([first, cat], both, {first.box: "red", cat.box: "blue"})
    assert not right([first, cat], both, {first.box: "blue", cat.box: "red"})


def test_places_are_of_every_pair() -> None:
    rule = Rule("position", (Clause("sink", 1), Clause("tie", 1, place="left of", of=0)))
    sink = one("sink", box=moved(50, 0))
    assert right([sink, one("tie")], rule) and not right([sink, one("tie", box=moved(100, 0))], rule)
    assert not right([one("tie")], rule)
    twice = Rule("position", (Clause("sink", 2), Clause("tie", 1, place="left of", of=0)))
    assert not right([sink, one("sink", 0.9, moved(-50, 0)), one("tie")], twice)


def test_an_object_is_cut_out_on_grey() -> None:
    image = torch.zeros(3, 20, 30)
    image[0] = 1
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[5:15, 5:10] = True
    part = cut_out(image, Detection("dog", 0.9, (4.0, 5.0, 10.0, 15.0), mask))
    assert part.shape == (3, 10, 6)
    assert torch.equal(part[:, :, 1:], image[:, 5:15, 5:10])
    assert (part[:, :, 0] * 255).round().unique().tolist() == [0x99]
    assert torch.equal(cut_out(image, Detection("dog", 0.9, (4.0, 5.0, 10.0, 15.0))), image[:, 5:15, 4:10])


def test_a_detection_is_a_class_times_its_masks_mean() -> None:
    """Two queries on 4 x 4 pixels: the first is surely a dog in one half, the second nothing."""
    logits = torch.full((2, len(NAMES) + 1), -20.0)
    dog, cat = NAMES.index("dog"), NAMES.index("cat")
    logits[0, dog], logits[0, cat] = math.log(0.6), math.log(0.4)
    logits[1, -1] = 5.0
    masks = torch.full((2, 4, 4), -1.0)
    masks[0, 1:3, :2] = 2.0
    found = detections(logits, masks, lambda m: m)
    inside = 1 / (1 + math.exp(-2))
    assert [d.name for d in found] == ["dog", "cat"]
    assert [d.score for d in found] == pytest.approx([0.6 * inside, 0.4 * inside], abs=1e-5)
    assert found[0].box == (0.0, 1.0, 2.0, 3.0) and found[0].mask is not None and int(found[0].mask.sum()) == 4
    logits[0, cat] = math.log(0.6 * SURE / (1 - SURE)) - 0.01  # just below the least score
    assert [d.name for d in detections(logits, masks, lambda m: m)] == ["dog"]
    empty = detections(logits, masks - 5, lambda m: m)  # a mask without pixels has no score
    assert [(d.score, d.box) for d in empty] == [(0.0, (0.0, 0.0, 0.0, 0.0))]
    assert detections(logits[1:], masks[1:], lambda m: m) == []


def test_inputs_are_scaled_to_800_pixels_or_1333_and_padded() -> None:
    for shape, inner, full in (
        ((64, 64), (800, 800), (800, 800)),
        ((40, 64), (800, 1280), (800, 1280)),
        ((30, 64), (625, 1333), (640, 1344)),
    ):
        pixels, seen = detector_pixels(torch.ones(1, 3, *shape))
        assert seen == inner and tuple(pixels.shape[-2:]) == full
        white = (255 - torch.tensor(detector.MEAN)) / torch.tensor(detector.STD)
        assert (pixels[0, :, : inner[0], : inner[1]] - white[:, None, None]).abs().max() < 1e-5
        assert not bool(pixels[..., inner[0] :, :].any()) and not bool(pixels[..., inner[1] :].any())
        assert restored(torch.zeros(2, full[0] // 4, full[1] // 4), full, inner, shape).shape == (2, *shape)


class Fixed:
    """A detector that finds a dog where the image is light, twice where it is white."""

    @property
    def weights(self) -> dict[str, str]:
        return {"a/model.safetensors": "0" * 64}

    def find(self, images: Tensor) -> list[list[Detection]]:
        return [
            [one("dog", 0.99, moved(2.0 * i, 0)) for i in range(int(image.mean() > 0.3) + int(image.mean() > 0.9))]
            for image in images
        ]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return miniature.word_tokenizer(["a photo of red blue green dog object"], 600, 24)


@pytest.fixture(scope="module")
def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **common, vocab_size=len(tokenizer), max_position_embeddings=24, projection_dim=8,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(**common, image_size=32, patch_size=8, projection_dim=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # the default ones are near zero
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


RULES = {
    "a dog": Rule("single_object", (Clause("dog", 1),)),
    "two dogs": Rule("counting", (Clause("dog", 2),), (Clause("dog", 3),)),
    "a dog and a cat": Rule("two_object", (Clause("dog", 1), Clause("cat", 1))),
    "a dog left of a dog": Rule("position", (Clause("dog", 1), Clause("dog", 1, place="left of", of=0))),
}


@pytest.fixture(scope="module")
def judge(clip: CLIPModel, tokenizer: CLIPTokenizer) -> Judge:
    return Judge(Fixed(), clip, tokenizer, RULES, Fixed().weights)


def test_colours_are_the_nearest_of_the_mean_texts(judge: Judge, clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    rng = torch.Generator().manual_seed(0)
    image, objects = torch.rand((3, 40, 48), generator=rng), [one("dog", box=(0.0, 0.0, 32.0, 32.0))]
    image = (image * 255).round() / 255
    with torch.no_grad():
        pixels = (image[None, :, :32, :32] - torch.tensor(geneval_clip()[0])[:, None, None]) / torch.tensor(
            geneval_clip()[1]
        )[:, None, None]
        seen = clip.get_image_features(pixel_values=pixels)
        seen = seen if isinstance(seen, Tensor) else seen.pooler_output
        means = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} dog",
                f"a photo of a {colour}-colored dog",
                f"a photo of a {colour} object",
            ]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            read = clip.get_text_features(**tokens)
            read = read if isinstance(read, Tensor) else read.pooler_output
            means.append(nn.functional.normalize(read, dim=1).mean(0))
        expected = COLOURS[int((seen @ nn.functional.normalize(torch.stack(means), dim=1).T).argmax())]
    assert judge.colours(image, objects) == [expected]
    assert len(judge.colours(image, [*objects, one("dog", box=(0.0, 0.0, 5.0, 40.0))])) == 2


def geneval_clip() -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_each_task_scores_its_own_prompts(judge: Judge) -> None:
    images = torch.stack([torch.full((3, 16, 16), v) for v in (0.0, 0.5, 1.0, 1.0)])
    prompts = ["a dog", "a dog", "two dogs", "a dog and a cat"]
    found = {task: GenEvalScorer(task, judge).score(images, prompts).tolist() for task in TASKS}
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert found["single_object"] == [0, 1, nan, nan] and found["counting"] == [nan, nan, 1, nan]
    assert found["two_object"] == [nan, nan, nan, 0] and found["colors"] == [nan] * 4


def painted(value: Callable[[str], float]) -> Callable[[Sequence[str], Sequence[int]], Tensor]:
    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        noise = torch.stack([torch.rand((3, 16, 16), generator=torch.Generator().manual_seed(s)) for s in seeds])
        return (torch.tensor([value(p) for p in prompts])[:, None, None, None] + 0.02 * noise).clamp(0, 1)

    return sampler


def test_the_score_is_the_mean_over_tasks(judge: Judge, tmp_path: Path) -> None:
    """Of uneven tasks, with intervals, pairs and kept measurements."""
    prompts = ("a dog", "two dogs", "a dog and a cat", "a dog left of a dog")
    known = next(known for known in LISTS if known.name == "geneval")
    rules = ImageProtocol("geneval-quick", 8, components=4, batch=4, seeds=2, prompts=known)
    extra = Extra(tuple(GenEvalScorer(task, judge) for task in TASKS))
    rows = [
        Row("teacher", 4, Guidance(), 4, painted(lambda p: 1.0 if p == "two dogs" else 0.5)),
        Row("student", 1, Guidance(), 1, painted(lambda p: 0.5)),
    ]
    first = evaluate_images(rows, rules, prompts, None, tmp_path, extra=extra)
    teacher, student = first["rows"]
    assert (teacher["geneval_single_object"], teacher["geneval_counting"], teacher["geneval_two_object"]) == (1, 1, 0)
    assert "geneval_colors" not in teacher and teacher["geneval"] == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert student["geneval"] == pytest.approx(1 / 4) and len(student["intervals"]["geneval"]) == 2
    of = {pair["metric"]: pair for pair in first["paired"] if pair["against"] == 0}
    assert of["geneval_counting"]["wins"] == 0 and of["geneval_single_object"]["wins"] == 0.5
    assert of["geneval"]["difference"] == pytest.approx(-2 / 8) and "geneval_colors" not in of
    again = evaluate_images(rows, rules, prompts, None, tmp_path, extra=extra)
    assert again["rows"] == [{**row, "seconds_per_image": again["rows"][i]["seconds_per_image"]}
                             for i, row in enumerate(first["rows"])]  # fmt: skip
    assert METRICS["geneval"].better == "high"


def test_other_prompts_are_refused(judge: Judge) -> None:
    extra = Extra((GenEvalScorer("counting", judge),))
    require_list(extra, "geneval-quick", "geneval")
    with pytest.raises(
        ValueError,
        match=r"^--metrics geneval_counting: is of the prompts of geneval, got protocol own-quick; choose --protocol "
        r"geneval or geneval-quick$",
    ):
        require_list(extra, "own-quick", "")


def tiny_detector() -> Segmenter:
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=2, dim_feedforward=32, num_attention_heads=2, num_queries=5, num_labels=80,
    )  # fmt: skip
    return Segmenter(config).eval()


def test_the_network_is_transformers_own() -> None:
    """With scipy, which its loss needs."""
    pytest.importorskip("scipy")
    network = tiny_detector()
    whole = Mask2FormerForUniversalSegmentation(network.config).eval()
    assert whole.load_state_dict(network.state_dict(), strict=False).unexpected_keys == []
    pixels = torch.randn((1, 3, 64, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen, (logits, masks) = whole(pixel_values=pixels), network(pixels)
    assert (seen.class_queries_logits - logits).abs().max() <= 1e-5
    assert (seen.masks_queries_logits - masks).abs().max() <= 1e-5


def test_the_networks_are_loaded_from_their_files(
    clip: CLIPModel, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they will be with the published weights: a tiny detector that is sure of everything it sees."""
    monkeypatch.setenv(PLACE, str(tmp_path))
    monkeypatch.setattr(detector, "SHORT", 64)
    with pytest.raises(ValueError, match=r"^--metrics geneval: its weights cannot be had here; put config\.json"):
        extra_of(["geneval"], None)
    network = tiny_detector()
    with torch.no_grad():
        network.class_predictor.weight.mul_(100)
    folder = tmp_path / "facebook--mask2former-swin-small-coco-instance"
    folder.mkdir()
    network.config.save_pretrained(folder)
    tensors = {k: v.contiguous() for k, v in network.state_dict().items()} | {"criterion.empty_weight": torch.ones(81)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    place = tmp_path / "openai--clip-vit-large-patch14"
    clip.save_pretrained(place)
    tokenizer.save_pretrained(place)
    files = ("config.json", "model.safetensors", *(p.name for p in place.glob("tokenizer*")))
    monkeypatch.setattr(geneval_judge, "CLIP_L", Weights("openai/clip-vit-large-patch14", files))
    judge = load_judge()
    assert set(judge.weights) >= {
        "facebook/mask2former-swin-small-coco-instance/model.safetensors",
        "openai/clip-vit-large-patch14/model.safetensors",
    }
    image = torch.rand((1, 3, 48, 64), generator=torch.Generator().manual_seed(1))
    (found,) = judge.finder.find(image)
    pixels, inner = detector_pixels(image)
    with torch.no_grad():
        logits, masks = network(pixels)
    assert inner == (64, 85) and pixels.shape[-2:] == (64, 96) and logits.shape == (1, 5, 81)
    expected = detections(logits[0], masks[0], lambda x: restored(x, (64, 96), inner, (48, 64)))
    assert found and [(d.name, d.box) for d in found] == [(d.name, d.box) for d in expected]
    assert all(d.mask is not None and d.mask.shape == (48, 64) for d in found)
    scorers = extra_of(["geneval", "geneval_counting"], None).scorers
    assert [scorer.key for scorer in scorers] == [f"geneval_{task}" for task in TASKS]
    scores = scorers[0].score(image, ["a photo of a bench"])
    assert scores.tolist() == [float(any(d.name == "bench" and d.score > SURE for d in found))]
    save_file({k: v for k, v in tensors.items() if k != "class_predictor.bias"}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=r"cannot be used \(they lack class_predictor\.bias\); fetch them again$"):
        load_detector("--metrics geneval")
