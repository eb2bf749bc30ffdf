"""Settings of distribution matching, one block for each term.

Rivals are settings of these: where states are matched, how the fake score is trained, and what comes beside matching.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from ..config_fields import POSITIVE, WEIGHT, OneOf, Range, check_fields
from ..core.weighting import WEIGHTINGS
from ..objectives.adversarial import GAN_LOSSES
from ..objectives.divergences import DIVERGENCES
from ..words import speaks_python
from .method import MOST_BATCH, MOST_STEPS

MOST_UPDATES = 1000  # of the fake score, per iteration


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """What is matched, where, and by which divergence.

    Raises ValueError for invalid settings.
    """

    divergence: Annotated[str, OneOf(DIVERGENCES)] = "reverse-kl"
    """Divergence between the diffused student and teacher. All but reverse-kl and fisher weigh samples by what the
    discriminator of the adversarial term knows (f-distill, arXiv 2502.15681)."""

    fisher_correction: Annotated[float, Range()] = 0.5
    """Factor c of the Fisher divergence's second term; 1/2 gives half of its exact gradient, SiD uses 1."""

    state: Literal["noisy", "clean"] = "noisy"
    """State that is matched: the noisy one where a step lands, or the clean estimate that the step makes."""

    tau_range: Literal["segment", "to_noise", "full"] = "segment"
    """Range of tau: the step's own segment (eq. 5), from there to pure noise, or all times."""

    tau_min: Annotated[float, Range(0, 1, below=True)] = 0.02
    """Smallest tau, as a fraction of the path from clean data to pure noise."""

    tau_max: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Largest tau, as a fraction of the path."""

    guidance_tau: Literal["own", "above"] | None = None
    """Make guidance a term of its own (decoupled DMD, arXiv 2511.22677), at a tau of its own: drawn like the other one,
    or from the landing time to pure noise. By default the guided teacher is matched at one tau."""

    guidance_weight: Annotated[float, WEIGHT] = 1.0
    """Weight of guidance as a term of its own, whose normaliser is its own, too."""

    def __post_init__(self) -> None:
        check_fields(self, "method.match")
        if not self.tau_min < self.tau_max:
            raise ValueError(
                f"method.match.tau_max: got {self.tau_max}, allowed are fractions above method.match.tau_min "
                f"({self.tau_min}) up to 1"
            )
        if self.guidance_tau is not None and self.divergence != "reverse-kl":  # the others' weights are not guidance's
            raise ValueError(
                f"method.match.guidance_tau: got {self.guidance_tau} with method.match.divergence={self.divergence}, "
                "whose scores are not a sum of terms; leave it out, or set the divergence to reverse-kl"
            )
        if self.tau_range == "full" and self.state != "clean":
            raise ValueError(
                "method.match.tau_range: got full, which needs method.match.state=clean: a noisy state is diffused "
                "to noisier times only"
            )


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class FakeScoreConfig:
    """How the fake score is trained.

    Raises ValueError for invalid settings.
    """

    updates: Annotated[int, Range(1, MOST_UPDATES)] = 1
    """Updates of the fake score for one of the student."""

    input: Literal["noisy", "clean"] = "noisy"
    """What x_tau is diffused from: the student's noisy state (importance sampling, eq. 7), or its clean estimate."""

    target: Literal["clean", "transition"] = "clean"
    """Regression target: the student's clean estimate, or the noise of the transition to x_tau."""

    weight: Annotated[str, OneOf(WEIGHTINGS)] = "own"
    """Weighting over time; `own` weights errors as those of the network's own output."""

    density_ratio: bool = False
    """Weigh the regression by eq. 7's density ratio, to the power 1/d as public code of TDM does."""

    consistency: Annotated[float, WEIGHT] = 0.0
    """Weight of the clean estimate's consistency along a short draw towards clean data (AC-DMD, arXiv 2605.26108);
    0.01 is what public code takes."""

    snr_clip: Annotated[float, POSITIVE] = 5.0
    """Largest weight."""

    share_noised_sample: bool = True
    """Use one x_tau for the last fake update and the student's (algorithm 1); otherwise each update draws its own."""

    pull: Annotated[float, Range(0, 1, hint=" (0: off); 0.03 is what public code takes")] = 0.0
    """Share of the way to the student's weights that the fake score's go after each update of the student (IDA of
    SenseFlow, arXiv 2506.00523)."""

    def __post_init__(self) -> None:
        check_fields(self, "method.fake")
        if self.density_ratio and (self.input == "clean" or self.target == "transition"):
            name, got = ("input", "clean") if self.input == "clean" else ("target", "transition")
            raise ValueError(
                f"method.fake.density_ratio: got true with method.fake.{name}={got}, which needs no ratio; set it to "
                "false, or the other to " + ("noisy" if name == "input" else "clean")
            )


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class GanConfig:
    """An adversarial term on real images (eq. 16).

    Raises ValueError for invalid settings.
    """

    weight: Annotated[float, WEIGHT] = 0.0
    """Weight of the term. It is a mean over tokens: next to `huber`, 5 is a fifth of the gradient."""

    loss: Annotated[str, OneOf(GAN_LOSSES)] = "hinge"
    """Adversarial loss."""

    features: Literal["teacher", "fake"] = "teacher"
    """Whose features the discriminator's heads read: the frozen teacher's, or the fake score's, which the
    discriminator's loss then trains, too (DMD2, arXiv 2405.14867)."""

    feature_weight: Annotated[float, WEIGHT] = 0.01
    """Weight of the discriminator's loss beside the fake score's own, where it reads the fake score's features; 0.01 is
    what public code of DMD2 takes."""

    r1: Annotated[float, WEIGHT] = 0.0
    """Weight of the gradient penalty of the discriminator on real images."""

    def __post_init__(self) -> None:
        check_fields(self, "method.gan")
        if self.features == "fake" and not self.weight:
            raise ValueError(
                "method.gan.features: got fake with method.gan.weight=0, which has no discriminator; set the weight "
                "above 0, or leave features out"
            )


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class FirstStepConfig:
    """Regression of the first step, in place of matching.

    Raises ValueError for invalid settings.
    """

    weight: Annotated[float, WEIGHT] = 0.0
    """Weight of the first step's regression on the teacher, which then takes the place of matching there (DP-DMD,
    arXiv 2602.03139); 0.05 is what public code takes."""

    teacher_steps: Annotated[int, Range(1, MOST_STEPS)] = 4
    """Guided steps of the teacher from noise to where the student's first step lands."""

    def __post_init__(self) -> None:
        check_fields(self, "method.first_step")


@speaks_python("method")
@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward beside matching, which the student is to raise.

    Raises ValueError for invalid settings.
    """

    weight: Annotated[float, WEIGHT] = 0.0
    """Weight of the reward."""

    scorer: str = ""
    """What is rewarded: brightness, contrast, saturation, sharpness, or a metric of `fewstep evaluate --metrics` that
    scores images; in Python any function."""

    by: Literal["gradient", "preference"] = "gradient"
    """Learn by the reward's own gradient, through the one step of the loss; or by preference among the images of a
    prompt, which a third network learns (TDM-R1, arXiv 2603.07700): for rewards without a gradient."""

    group: Annotated[int, Range(2, MOST_BATCH)] = 8
    """Images of a prompt that are compared, neighbours in a batch."""

    strength: Annotated[float, POSITIVE] = 100.0
    """Factor beta of a preference: the larger, the nearer the third network stays to the teacher."""

    def __post_init__(self) -> None:
        check_fields(self, "method.reward")
