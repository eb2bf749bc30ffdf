"""Every weight comes from its file.

A weight that is missing, left over, not finite, pickled or elsewhere is one line that names file and tensor.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.load import BUNDLED, HASHES, bundled, load_teacher
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.parts import load_part, network_kind, part_names
from fewstep.backbones.weights import UnfitError, load_network, mark, strangers, weights_in

from .. import pipelines

TINY = ("sd", "sdxl", "pixart", "cogvideox", "sd3")


class Part(NamedTuple):
    """One network in a pipeline's folder."""

    folder: Path
    name: str
    kind: type[nn.Module]

    @property
    def file(self) -> Path:
        (file,) = (self.folder / self.name).glob("*.safetensors")
        return file


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """All networks of all families."""
    folders = [pipelines.save(f, tmp_path_factory.mktemp("weights") / f) for f in TINY] + [BUNDLED / "fashion"]
    return [part for folder in folders for part in networks_in(folder)]


def networks_in(folder: Path) -> Iterator[Part]:
    index = DiffusionPipeline.load_config(folder)
    pipeline = FAMILIES[index["_class_name"]].pipeline
    for name, called in part_names(pipeline, index).items():
        kind = network_kind(pipeline, name, called)
        if kind is not None:
            yield Part(folder, name, kind)


def changed(part: Part, into: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the part's folder with other tensors in its file."""
    shutil.copytree(part.folder / part.name, into, dirs_exist_ok=True)
    state = load_file(part.file)
    change(state)
    save_file(state, into / part.file.name, {"format": "pt"})
    return into


def last(state: dict[str, Tensor]) -> str:
    """A tensor's name that is neither a first layer nor tied to another."""
    return sorted(
        n for n, t in state.items() if t.is_floating_point() and "embed_tokens" not in n and n != "shared.weight"
    )[-1]


def put(state: dict[str, Tensor], value: float) -> None:
    state[last(state)].view(-1)[-1] = value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop(last(s)), "{file} lacks '{name}' (1 tensor is missing)"),
        (
            lambda s: s.update(extra=s[last(s)].clone()),
            "{file} has 'extra' (1 tensor is left over, which this network does not have)",
        ),
        (lambda s: put(s, float("nan")), "{file} has numbers in '{name}' that are not finite"),
        (lambda s: put(s, float("-inf")), "{file} has numbers in '{name}' that are not finite"),
    ],
    ids=["missing", "left over", "nan", "infinity"],
)
def test_every_network_of_every_family(
    parts: list[Part], change: Callable[[dict[str, Tensor]], None], said: str, tmp_path: Path
) -> None:
    assert {p.name for p in parts} >= {"unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    for i, part in enumerate(parts):
        state = load_file(part.file)
        folder = changed(part, tmp_path / str(i) / part.name, change)
        with pytest.raises(UnfitError) as error:
            load_network(part.kind, folder)
        # transformers may call a tensor by the name that its class has for it.
        text, name = str(error.value), last(state).removeprefix("text_model.")
        assert text.replace("text_model.", "").startswith(
            said.format(file=f"{part.name}/{part.file.name}", name=name)
        ), text


@pytest.fixture
def sd(tmp_path: Path) -> Path:
    return pipelines.save("sd", tmp_path / "sd")


def test_one_line_for_the_user_and_for_a_plan(sd: Path) -> None:
    """A training and a plan name model, file and tensor.

    A plan reads headers alone: it sees which files are there, but no values.
    """
    file = sd / "text_encoder" / "model.safetensors"
    state = load_file(file)
    name = last(state)
    save_file({k: v for k, v in state.items() if k != name}, file, {"format": "pt"})
    with pytest.raises(
        ValueError,
        match=rf"^teacher: {sd}: text_encoder/model.safetensors lacks '\S+' \(1 tensor is missing\); "
        r"download it again$",
    ):
        load_teacher(sd)
    file.unlink()
    for load in (load_teacher, meta_teacher):
        with pytest.raises(
            ValueError,
            match=rf"^teacher: {sd}: text_encoder/ has no weights \(no model.safetensors\); download it again$",
        ):
            load(sd)


def test_numbers_too_large_for_the_type_are_not_finite(sd: Path) -> None:
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    put(state, 1e6)
    save_file(state, file, {"format": "pt"})
    assert load_teacher(sd).name == "sd"
    with pytest.raises(
        ValueError, match=r"unet/\S+ has numbers in '\S+' that are not finite in float16 .*; set dtype=float32, or"
    ):
        load_teacher(sd, torch.float16)


def test_files_of_another_precision_are_found_by_what_is_there(sd: Path) -> None:
    """Half precision alone, in some of the parts: the same values, for a plan too."""
    wanted = load_teacher(sd, torch.float16)
    for part in ("unet", "text_encoder"):
        (file,) = (sd / part).glob("*.safetensors")
        save_file(
            {k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"), {"format": "pt"}
        )
        file.unlink()
    meta_teacher(sd)
    found = load_teacher(sd, torch.float16)
    assert all(torch.equal(a, b) for a, b in zip(wanted.module.parameters(), found.module.parameters(), strict=True))
    other = sd / "unet" / "diffusion_pytorch_model.ema.safetensors"
    half = sd / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(half, other)
    assert weights_in(UNet2DConditionModel, sd / "unet").variant == "fp16"
    half.rename(half.with_name("diffusion_pytorch_model.mine.safetensors"))
    with pytest.raises(ValueError, match=r"unet/ has weights of several kinds \(ema, mine\); leave one of them"):
        load_teacher(sd)


@pytest.mark.parametrize("kind", [UNet2DConditionModel, CLIPTextModel])
def test_shards(kind: type[Any], sd: Path, tmp_path: Path) -> None:
    folder = sd / ("unet" if kind is UNet2DConditionModel else "text_encoder")
    whole = load_network(kind, folder)
    whole.save_pretrained(tmp_path / "x" / folder.name, max_shard_size="20KB")
    folder = tmp_path / "x" / folder.name
    assert len(weights_in(kind, folder).files) > 2
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), load_network(kind, folder).state_dict().values(), strict=True)
    )
    (index,) = folder.glob("*.index.json")
    value = json.loads(index.read_text())
    first = next(iter(value["weight_map"]))
    for name, said in (
        ("../../sd/unet/diffusion_pytorch_model.safetensors", "allowed are .safetensors files next to it"),
        ("/etc/passwd", "allowed are .safetensors files next to it"),
        ("shard.bin", "allowed are .safetensors files next to it"),
        ("nowhere.safetensors", f"{folder.name}/nowhere.safetensors is missing"),
    ):
        index.write_text(json.dumps(value | {"weight_map": value["weight_map"] | {first: name}}))
        with pytest.raises(UnfitError, match=said):
            load_network(kind, folder)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000):
        index.write_text(text)
        with pytest.raises(UnfitError, match=r"index.json (is damaged|names no files)"):
            load_network(kind, folder)


def test_only_regular_files_inside_the_folder(sd: Path, tmp_path: Path) -> None:
    file = sd / "vae" / "diffusion_pytorch_model.safetensors"
    elsewhere = shutil.move(file, tmp_path / "elsewhere.safetensors")
    file.symlink_to(elsewhere)
    with pytest.raises(
        ValueError,
        match=rf"vae/\S+ is a link that leads out of {sd}, to '\S+elsewhere.safetensors'; put the file itself there",
    ):
        load_teacher(sd)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"vae/\S+ is no regular file"):
        load_teacher(sd)
    file.unlink()
    shutil.copy(elsewhere, sd / "vae" / "diffusion_pytorch_model.bin")
    for load in (load_teacher, meta_teacher):
        with pytest.raises(
            ValueError,
            match=r"vae/diffusion_pytorch_model.bin is a pickle, .*; pass a model in safetensors, "
            r"or convert it as docs/checkpoints.md says$",
        ):
            load(sd)
    shutil.move(elsewhere, sd / "vae" / "real.safetensors")
    file.symlink_to("real.safetensors")
    load_teacher(sd)


def test_the_hubs_cache_is_links_into_its_store(sd: Path, tmp_path: Path) -> None:
    store, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    shutil.copytree(sd, snapshot)
    store.mkdir()
    for i, file in enumerate(sorted(snapshot.rglob("*.safetensors"))):
        file.rename(store / str(i))
        file.symlink_to(os.path.relpath(store / str(i), file.parent))
    load_teacher(snapshot)


def test_classes_are_those_of_the_family(sd: Path) -> None:
    index = json.loads((sd / "model_index.json").read_text())
    (sd / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    for load in (load_teacher, meta_teacher):
        with pytest.raises(
            ValueError, match="its vae is a AutoencoderTiny, allowed in a StableDiffusionPipeline are AutoencoderKL"
        ):
            load(sd)


def test_scales_of_eight_bits_are_not_passed_over(sd: Path) -> None:
    file = sd / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.weight_scale": torch.ones(())}, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"keeps its weights in 8 bits or fewer, with scales next to them \(conv_in.weight_scale\)"
    ):
        load_teacher(sd)


def test_values_are_compared_whatever_the_library_says(sd: Path) -> None:
    """Values of a network that are not the file's are found.

    A library may fill a network at random and say nothing of it. Names and types may differ.
    """
    file = sd / "text_encoder" / "model.safetensors"
    right = load_network(CLIPTextModel, sd / "text_encoder", torch.bfloat16)
    assert strangers(right.state_dict(), [file]) == []
    assert len(strangers(CLIPTextModel(right.config).state_dict(), [file])) > 5


def test_position_counts_of_old_encoders_are_left_alone(sd: Path) -> None:
    file = sd / "text_encoder" / "model.safetensors"
    state = load_file(file)
    prefix = "text_model." if any(n.startswith("text_model.") for n in state) else ""
    save_file(state | {f"{prefix}embeddings.position_ids": torch.arange(8)[None]}, file, {"format": "pt"})
    load_teacher(sd)


def test_tied_weights_may_be_in_the_file_once(tmp_path: Path) -> None:
    folder = pipelines.save("pixart", tmp_path / "p") / "text_encoder"
    state = load_file(folder / "model.safetensors")
    assert len({"shared.weight", "encoder.embed_tokens.weight"} & set(state)) == 1
    load_network(T5EncoderModel, folder)


def test_bundled_teachers_are_those_that_were_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = json.loads((BUNDLED / HASHES).read_text())
    assert set(hashes) == {
        f.relative_to(BUNDLED).as_posix() for name in bundled() for f in (BUNDLED / name).rglob("*.safetensors")
    }
    load_teacher("fashion")
    shutil.copytree(BUNDLED / "fashion", tmp_path / "fashion")
    shutil.copy(BUNDLED / HASHES, tmp_path)
    file = tmp_path / "fashion" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr("fewstep.backbones.load.BUNDLED", tmp_path)
    with pytest.raises(
        ValueError, match=r"^teacher: \S+fashion: unet/\S+ is not the file that was shipped; install fewstep again$"
    ):
        load_teacher("fashion")


def test_an_autoencoder_that_overflows_keeps_what_its_file_says(sd: Path) -> None:
    """Single precision all the way, not by way of half."""
    part = load_part(AutoencoderKL, sd, "vae", torch.float16)
    state = load_file(sd / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(t, state[n]) for n, t in part.state_dict().items())
    assert isinstance(load_teacher(sd, torch.float16).pipe, StableDiffusionPipeline)  # type: ignore[attr-defined]


def test_weights_of_more_numbers_than_float32_counts_have_a_mark() -> None:
    """The embeddings of most text encoders."""
    many = torch.zeros(2**24 + 2, dtype=torch.bfloat16)
    many[-1] = 1
    assert mark(many, torch.bfloat16)[2][-1] == 1
