"""A run starts from the student of others: a LoRA of any rank, or a whole network."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.backbones.base import denoiser
from fewstep.backbones.families import family_of_pipeline
from fewstep.backbones.load import load_teacher
from fewstep.backbones.lora import flat, fuse
from fewstep.core.guidance import Guidance
from fewstep.methods.method import Method
from fewstep.roles.adapters import adapter_state, targets
from fewstep.roles.roles import Roles
from fewstep.runs.foreign import initialize, require_initial
from fewstep.runs.init import roles_for

from .. import pipelines, tiny

PROMPTS = ["red cat", "blue dog"]
METHOD = fewstep.TDM(steps=2, warmup=0)
LAYERS = ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("sd", tmp_path_factory.mktemp("foreign") / "sd")


def lora(teacher: Any, rank: int, alpha: float) -> dict[str, Tensor]:
    """As kohya's scripts write it, on some layers of attention and one convolution."""
    rng, found = torch.Generator().manual_seed(1), dict[str, Tensor]()
    for name, layer in teacher.module.named_modules():
        if name.endswith((*LAYERS, "resnets.0.conv1")):
            out, *kernel = layer.weight.shape
            stem = f"lora_unet_{name.replace('.', '_')}"
            found[f"{stem}.lora_down.weight"] = 0.2 * torch.randn(rank, *kernel, generator=rng)
            found[f"{stem}.lora_up.weight"] = 0.2 * torch.randn(out, rank, *[1] * (len(kernel) - 1), generator=rng)
            found[f"{stem}.alpha"] = torch.tensor(alpha)
    return found


def begun(folder: Path, file: Path, method: Method = METHOD, **config: Any) -> tuple[Roles, str]:
    said: list[str] = []
    roles = roles_for(load_teacher(folder), method, fewstep.RolesConfig(**config), init_from=file, say=said.append)
    return roles, said[0]


def drawn(roles: Roles) -> Tensor:
    """The student's clean estimates at two times."""
    backbone = roles.backbone
    x = torch.randn(2, *backbone.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([999.0, 499.0], dtype=torch.float64)
    with torch.no_grad():
        return roles.denoise("student", backbone.encode(PROMPTS))(x, t).x0


def fused(folder: Path, file: Path) -> Tensor:
    teacher: Any = load_teacher(folder)
    fuse(teacher.pipe, str(file), 1.0)
    x = torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([999.0, 499.0], dtype=torch.float64)
    with torch.no_grad():
        return denoiser(teacher, teacher.module, teacher.encode(PROMPTS))(x, t).x0


@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (5, None), (6, 3.0)])
def test_a_lora_of_no_higher_rank_is_taken_as_it_is(
    folder: Path, tmp_path: Path, rank: int, alpha: float | None
) -> None:
    save_file(lora(load_teacher(folder), 2, 1.0), tmp_path / "x.safetensors")
    roles, said = begun(folder, tmp_path / "x.safetensors", rank=rank, alpha=alpha)
    assert re.fullmatch(
        rf"init_from: rank {rank} keeps 100.0% of the energy of what x.safetensors changes, in \d+ layers", said
    )
    torch.testing.assert_close(drawn(roles), fused(folder, tmp_path / "x.safetensors"), rtol=1e-3, atol=1e-3)
    assert all(torch.equal(roles.average[n], p) for n, p in roles.trained["student"].items())
    own = [p for n, p in roles.trained["student"].items() if "lora_A" in n]
    assert all(bool(p.any(dim=tuple(range(1, p.ndim))).all()) for p in own), "every direction can be trained"


def test_a_lora_of_higher_rank_is_cut_and_says_what_is_kept(folder: Path, tmp_path: Path) -> None:
    save_file(lora(load_teacher(folder), 8, 8.0), tmp_path / "x.safetensors")
    wanted, shares = fused(folder, tmp_path / "x.safetensors"), []
    for rank in (1, 4, 8):
        roles, said = begun(folder, tmp_path / "x.safetensors", rank=rank)
        shares.append(float(re.search(r"keeps ([\d.]+)%", said)[1]))  # type: ignore[index]
        apart = float((drawn(roles) - wanted).square().mean())
        if rank == 1:
            first = apart
    assert 5 < shares[0] < shares[1] < shares[2] == 100 and apart < 1e-6 < first


def test_layers_without_lora_here_are_said(folder: Path, tmp_path: Path) -> None:
    save_file(lora(load_teacher(folder), 2, 2.0), tmp_path / "x.safetensors")
    said = begun(folder, tmp_path / "x.safetensors", rank=2, targets="attention")[1]
    assert re.search(r"; \d+\.\d% of it is in layers without LoRA here \(\S+, \S+, \S+ and \d+ more\)$", said)
    with pytest.raises(
        ValueError, match=r"cannot be used \(it changes none of the layers that carry the student's LoRA\)"
    ):
        begun(folder, tmp_path / "x.safetensors", rank=2, exclude=("attentions", "resnets"))


def test_whole_differences_next_to_a_lora_are_said(folder: Path, tmp_path: Path) -> None:
    """As in Wan's public students: the LoRA is taken, and what it lacks of norms and biases is said."""
    tensors = lora(load_teacher(folder), 2, 2.0)
    key = next(iter(tensors)).partition(".")[0]
    save_file(tensors | {f"{key}.diff_b": torch.full((16,), 0.5)}, tmp_path / "x.safetensors")
    said = begun(folder, tmp_path / "x.safetensors", rank=2)[1]
    assert re.search(rf"; \d+\.\d% of it is in layers without LoRA here \({key}\.diff_b\)$", said)
    with pytest.raises(ValueError, match="it holds whole differences of weights"):
        begun(folder, tmp_path / "x.safetensors", lora=False)


def test_a_whole_network(folder: Path, tmp_path: Path) -> None:
    other: Any = load_teacher(folder)
    save_file(lora(other, 2, 2.0), tmp_path / "lora.safetensors")
    wanted = fused(folder, tmp_path / "lora.safetensors")
    fuse(other.pipe, str(tmp_path / "lora.safetensors"), 1.0)
    save_file({k: v.clone() for k, v in other.module.state_dict().items()}, tmp_path / "turbo.safetensors")
    roles, said = begun(folder, tmp_path / "turbo.safetensors", rank=4)
    assert "rank 4 keeps 100.0% of the energy of what turbo.safetensors changes" in said
    torch.testing.assert_close(drawn(roles), wanted, rtol=1e-2, atol=1e-2)
    for file in ("turbo", "lora"):
        roles, said = begun(folder, tmp_path / f"{file}.safetensors", lora=False)
        assert said.startswith(f"init_from: the student starts with what {file}.safetensors changes in ")
        torch.testing.assert_close(drawn(roles), wanted, rtol=1e-3, atol=1e-3)
    rounded = replace(roles, config=fewstep.RolesConfig(rank=4, quantize="int8"))
    with pytest.raises(ValueError, match=r"to be compared with a base in full\); set roles\.quantize=null"):
        initialize(rounded, tmp_path / "turbo.safetensors")


@pytest.mark.parametrize("kind", ["wan", "wan-a14b"])
def test_wan_and_its_pair_of_networks(kind: str, tmp_path: Path) -> None:
    """Of a pair, the file for low noise lies next to that for high noise."""
    folder = pipelines.save(kind, tmp_path / kind)
    rng = torch.Generator().manual_seed(1)
    names = ["x_high_noise", "x_low_noise"] if kind == "wan-a14b" else ["x"]
    for name in names:
        key = "diffusion_model.blocks.0.self_attn.q"
        up, down = (0.2 * torch.randn(*s, generator=rng) for s in ((32, 2), (2, 32)))
        save_file({f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}, tmp_path / f"{name}.safetensors")
    files = [tmp_path / f"{name}.safetensors" for name in names]
    roles, said = begun(folder, files[0], rank=2)
    assert f"in {len(names)} layers" in said
    teacher = load_teacher(" + ".join(map(str, [folder, *files])))
    x, t = torch.randn(2, *teacher.shape), torch.tensor([1.0, 0.5], dtype=torch.float64)
    with torch.no_grad():
        cond = teacher.encode(PROMPTS)
        theirs = denoiser(teacher, teacher.module, cond)(x, t).x0
        ours = roles.denoise("student", cond)(x, t).x0
        base = roles.teacher(cond, cond, Guidance())(x, t).x0
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - base).flatten(1).abs().amax(1).gt(1e-4).all()
    if len(files) > 1:
        files[1].unlink()
        assert said.endswith("layers") and begun(folder, files[0], rank=2)[1].endswith(
            "; the network for low noise starts from the teacher"
        )
        with pytest.raises(ValueError, match=r"^init_from: .*its name does not say for which it is\); rename it"):
            begun(folder, files[0].rename(tmp_path / "style.safetensors"), rank=2)


class Layout(NamedTuple):
    """How a student is published: its layers' names, by diffusers' and the original ones, and what is next to them."""

    family: str
    stem: Callable[[str, Mapping[str, str]], str]
    ends: tuple[str, str] = (".lora_down.weight", ".lora_up.weight")
    alpha: bool = True
    blocks: tuple[str, ...] = ("transformer_blocks.0.", "blocks.0.")
    whole: Mapping[str, tuple[int, ...]] = {}


UNET = ("down_blocks.0.", "down_blocks.1.", "mid_block.")
LAYOUTS = {
    "SDXL-Lightning, Hyper-SDXL": Layout("sdxl", lambda name, _: f"lora_unet_{flat(name)}", blocks=UNET),
    "SDXL under original names": Layout("sdxl", lambda name, old: f"lora_unet_{flat(old[name])}", blocks=UNET),
    "LCM-LoRA, Hyper-SD15": Layout("sd", lambda name, _: f"lora_unet_{flat(name)}", blocks=UNET),
    "Hyper-FLUX": Layout("flux", lambda name, _: f"transformer.{name}", (".lora_A.weight", ".lora_B.weight"), False),
    "Hyper-SD3": Layout("sd3", lambda name, _: f"transformer.{name}", (".lora_A.weight", ".lora_B.weight"), False),
    "Qwen-Image-Lightning": Layout("qwenimage", lambda name, _: name),
    "lightx2v": Layout(
        "wan",
        lambda name, old: f"diffusion_model.{old[name]}",
        alpha=False,
        whole={
            "diffusion_model.blocks.0.self_attn.q.diff_b": (32,),
            "diffusion_model.blocks.0.norm3.diff": (32,),
            "diffusion_model.blocks.0.norm3.diff_b": (32,),
            "diffusion_model.blocks.0.cross_attn.norm_k.diff": (32,),
            "diffusion_model.blocks.0.diff_m": (1, 6, 32),
        },
    ),
    "Wan2.2-Lightning": Layout("wan", lambda name, old: f"diffusion_model.{old[name]}"),
}


@pytest.mark.parametrize("published", LAYOUTS)
def test_layouts_in_which_students_are_published(published: str, tmp_path: Path) -> None:
    """Every layer of the file is one of the student's, and changes what the file says."""
    layout, rng = LAYOUTS[published], torch.Generator().manual_seed(1)
    teacher: Any = pipelines.backbone(layout.family)
    old = dict(family_of_pipeline(teacher.pipe).original_names(teacher.module))
    config, layers = fewstep.RolesConfig(rank=3), dict(teacher.module.named_modules())
    names = [n for n in targets(teacher.module, config.targets, config.exclude) if n.startswith(layout.blocks)]
    file, added = {n: torch.full(shape, 0.01) for n, shape in layout.whole.items()}, dict[str, Tensor]()
    for name in names:
        out, *kernel = layers[name].weight.shape
        down, up = (torch.randn(*shape, generator=rng) for shape in ((2, *kernel), (out, 2, *[1] * (len(kernel) - 1))))
        stem = layout.stem(name, old)
        file |= {stem + layout.ends[0]: down, stem + layout.ends[1]: up}
        file |= {f"{stem}.alpha": torch.tensor(1.0)} if layout.alpha else {}
        added[name] = (0.5 if layout.alpha else 1) * up.flatten(1) @ down.flatten(1)
    save_file(file, tmp_path / "x.safetensors")
    said: list[str] = []
    roles = roles_for(teacher, METHOD, config, init_from=tmp_path / "x.safetensors", say=said.append)
    assert f"of what x.safetensors changes, in {len(names)} layers" in said[0] and len(names) > 5
    assert ("of it is in layers without LoRA here" in said[0]) == bool(layout.whole)
    state = adapter_state(roles.networks["student"], "student")
    for name, change in added.items():
        own = state[f"{name}.lora_B.weight"].flatten(1) @ state[f"{name}.lora_A.weight"].flatten(1)
        torch.testing.assert_close(own, change, rtol=1e-3, atol=1e-3)


ATTENTION, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0"
TOGETHER = {  # layers of FLUX.1's original code, and diffusers' layers that are their rows
    "double_blocks_0_img_attn_qkv": [f"{ATTENTION}.to_q", f"{ATTENTION}.to_k", f"{ATTENTION}.to_v"],
    "single_blocks_0_linear1": [*(f"{SINGLE}.attn.to_{n}" for n in "qkv"), f"{SINGLE}.proj_mlp"],
}


def test_a_layer_of_the_original_program_is_several_here(tmp_path: Path) -> None:
    """FLUX.1 as kohya's scripts write it, rank 2 in the file and 3 here: each layer has its own rows, with alpha."""
    teacher: Any = pipelines.backbone("flux")
    rng = torch.Generator().manual_seed(1)
    layers, file, wanted = dict(teacher.module.named_modules()), dict[str, Tensor](), dict[str, Tensor]()
    for stem, names in TOGETHER.items():
        counts = [len(layers[n].weight) for n in names]
        down, up = torch.randn(2, 32, generator=rng), torch.randn(sum(counts), 2, generator=rng)
        file |= {f"lora_unet_{stem}.lora_down.weight": down, f"lora_unet_{stem}.lora_up.weight": up}
        file[f"lora_unet_{stem}.alpha"] = torch.tensor(1.0)
        wanted |= dict(zip(names, (0.5 * up @ down).split(counts), strict=True))
    save_file(file, tmp_path / "x.safetensors")
    said: list[str] = []
    config = fewstep.RolesConfig(rank=3)
    roles = roles_for(teacher, METHOD, config, init_from=tmp_path / "x.safetensors", say=said.append)
    assert said == ["init_from: rank 3 keeps 100.0% of the energy of what x.safetensors changes, in 7 layers"]
    state = adapter_state(roles.networks["student"], "student")
    for name, change in wanted.items():
        own = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(own, change, rtol=1e-3, atol=1e-3)


def test_it_is_trained_and_resumed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same start again: a run of two iterations is that of one, resumed."""
    save_file(lora(load_teacher(folder), 8, 8.0), tmp_path / "x.safetensors")

    def run(out: str, iterations: int) -> dict[str, Tensor]:
        train = fewstep.TrainConfig(iterations=iterations, batch=2, checkpoint_every=1)
        *_, step = fewstep.distill(
            load_teacher(folder), METHOD, PROMPTS, train=train, roles=fewstep.RolesConfig(rank=4),
            out=tmp_path / out, init_from=tmp_path / "x.safetensors", watch=None,
        )  # fmt: skip
        return {n: p.detach().clone() for n, p in step.roles.trained["student"].items()}

    whole = run("whole", 2)
    assert "init_from: rank 4 keeps" in capsys.readouterr().err
    run("parts", 1)
    again = run("parts", 2)
    assert whole.keys() == again.keys() and all(torch.equal(whole[k], again[k]) for k in whole)


def test_files_that_are_no_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^init_from: there is no .*x.safetensors; pass a run, its final/ folder or"):
        require_initial(tmp_path / "x.safetensors")
    file = tmp_path / "x.safetensors"
    text, middle = "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_unet_mid_block_attentions_0_proj_in"
    both = {f"{text}.lora_down.weight": torch.ones(2, 32), f"{text}.lora_up.weight": torch.ones(64, 2)}
    for tensors, said in (
        ({"lora_unet_nowhere.lora_down.weight": torch.ones(2, 2)}, "1 of its 1 layers are not there"),
        (both, "it changes the text_encoder too"),
        ({f"{middle}.dora_scale": torch.ones(2)}, "it holds DoRA, a LoRA with magnitudes"),
    ):
        save_file(tensors, file)
        with pytest.raises(ValueError, match=rf"^init_from: \S+ cannot be used \({said}"):
            begun(folder, file, rank=2)
    save_file({"weight": torch.ones(2)}, file)
    with pytest.raises(ValueError, match=r"^init_from: \S+ cannot be used \("):
        begun(folder, file, rank=2)
    with pytest.raises(ValueError, match="the teacher own-network is a network of one's own"):
        roles_for(tiny.denoiser(), METHOD, fewstep.RolesConfig(rank=2), init_from=file)
