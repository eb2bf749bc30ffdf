"""Recipes: one YAML file, checked strictly, with dotted overrides.

Every mistake is one line that names the option.
"""

import re
import shlex
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import partial, reduce
from operator import or_
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from ..backbones.generate import require_seed
from ..backbones.sizes import Size
from ..core.guidance import Guidance
from ..data.teacher_images import TEACHER_IMAGES, TEACHER_STEPS
from ..heads.head import KINDS, require_steps
from ..methods.method import Method, require_initial_student
from ..methods.per_step import require_per_step, require_same_steps
from ..methods.presets import METHODS, PRESETS, require_roles
from ..names import expanded, require_name
from ..reading import reason, text_in, unreadable
from ..recipes_path import recipe_path
from ..roles.roles import RolesConfig
from ..training.fit import FitConfig
from ..training.loop import TrainConfig, require_groups, require_updates
from ..typed import shown
from .rewards import require_reward

Model = TypeVar("Model", bound=BaseModel)
MOST = 100_000  # values in a recipe
DEFAULT_METHOD = "tdm"
Place = Annotated[str, AfterValidator(expanded)]  # a path, a hub id or a name
Name = Annotated[
    str,
    AfterValidator(
        lambda name: require_name(name, "name", "it becomes the run's folder: choose another, or pass --out")
    ),
]


class Strict(BaseModel):
    """A model in which unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptsConfig(Strict):
    """Where a recipe's prompts come from."""

    source: Place = "bundled"
    """File or hub data set of prompts (see `data.prompts`), or `bundled` for the prompts of a bundled teacher."""

    column: str | None = None
    """Column of the prompts; by default the column is found."""

    held_out: float = Field(default=0.05, ge=0, le=0.5)
    """Share of the prompts that is kept out of the training, to evaluate with: at most 128, and none where the share
    is of fewer than 16. Models of classes and of emoji train on all."""


class PreviewConfig(Strict):
    """The previews of a run: fixed prompts and seeds, and measurements."""

    prompts: list[str] = Field(default_factory=list)
    """Prompts of the previews; by default the first eight of the training."""

    seed: Annotated[int, AfterValidator(partial(require_seed, option="preview.seed"))] = 0
    """Seed of the first image; the other images count up."""

    every: int = Field(default=100, ge=1)
    """Iterations between two previews."""

    teacher_steps: int = Field(default=50, ge=1)
    """Steps of the teacher in the top row."""

    protocol: str | None = None
    """Protocol under which the student is measured at every preview, for the report's quality curves."""

    metrics: list[str] = Field(default_factory=list)
    """Metrics of other packages that are measured at every preview too, such as `pickscore`; they take a protocol."""

    best_by: str | None = None
    """Number that says which preview is the best, the lowest or the highest as it goes; by default `fd_real`, or
    `fd_teacher` without real images."""

    keep_best: bool = True
    """Whether the student of the best preview stays in the run's `best` folder."""

    final: Literal["last", "best"] = "last"
    """Which student becomes `final/`: that of the last iteration, or that of the best preview."""

    patience: int | None = Field(default=None, ge=1)
    """Previews in a row without improvement after which the training ends early."""

    @model_validator(mode="after")
    def _best_is_kept(self) -> "PreviewConfig":
        if self.final == "best" and not self.keep_best:
            raise ValueError("preview.final: got best with preview.keep_best=false; set one of the two otherwise")
        return self


# Keys of fewstep 0.1.0 and what they are called now.
RENAMED = {
    "start": "init_from",
    "first": "warm_start",
    "guidance_rescale": "method.guidance.rescale",
    "preview.measure": "preview.protocol",
    "data.guidance_until": "data.guidance.stop",
    "data.student": "data.from_student",
    "method.guidance_tilt": "method.guidance.tilt",
    "method.guidance_parallel": "method.guidance.apg_eta",
    "method.divergence": "method.match.divergence",
    "method.fisher_correction": "method.match.fisher_correction",
    "method.tau": "method.match.tau_range",
    "method.tau_min": "method.match.tau_min",
    "method.tau_max": "method.match.tau_max",
    "method.fake_draw": "method.fake.input",
    "method.fake_target": "method.fake.target",
    "method.fake_updates": "method.fake.updates",
    "method.fake_weight": "method.fake.weight",
    "method.share_draw": "method.fake.share_noised_sample",
    "method.gan_loss": "method.gan.loss",
    "method.gan_r1": "method.gan.r1",
    "method.anchor": "method.regression_weight",
    "method.free_first": "method.analytic_first_step",
    "method.scales": "method.guidance_scales",
    "method.target": "method.name",
    "roles.share": "roles.lora",
    "roles.skip": "roles.exclude",
    "roles.base": "roles.quantize",
}
INIT_HEAD = {"keep": "keep", "fold": "absorb"}  # values of 0.1.0's method.head, which is another option now


def _merged(known: dict[str, Any], value: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings into known settings, block by block."""
    return {
        **known,
        **{
            k: _merged(known[k], v) if isinstance(v, Mapping) and isinstance(known.get(k), dict) else v
            for k, v in value.items()
        },
    }


NUMBERS = {"guidance": "scale", "gan": "weight"}  # the setting of a block that a number in the block's place is


def _number_as(setting: str, value: Any) -> Any:
    """Turn a number in a block's place into the main setting."""
    return {setting: value} if isinstance(value, int | float) and not isinstance(value, bool) else value


def _with_preset(value: Any) -> Any:
    if isinstance(value, Method):
        return value
    if not isinstance(value, dict):
        raise ValueError(
            f"method: got {shown(value)}, allowed are settings, e.g. method: {{name: tdm, steps: 4}}; correct it"
        )
    name = str(value.get("name", DEFAULT_METHOD))
    if name not in PRESETS:
        raise ValueError(f"method.name: got {name!r}, allowed are {', '.join(PRESETS)}")
    given = dict(value)
    for block, number in NUMBERS.items():
        if block in given:
            given[block] = _number_as(number, given[block])
    return _merged(asdict(PRESETS[name]), given)


def _kind_of_method(value: Any) -> str:
    return type(value if isinstance(value, Method) else PRESETS[value["name"]]).__name__


if TYPE_CHECKING:
    AnyMethod = Method
else:  # a class of `METHODS`: the settings on top of the preset of the method's name
    AnyMethod = Annotated[
        reduce(or_, (Annotated[kind, Tag(name)] for name, kind in METHODS.items())),
        Discriminator(_kind_of_method),
        BeforeValidator(_with_preset),
    ]
AnyGuidance = Annotated[Guidance, BeforeValidator(partial(_number_as, "scale"))]


class DataConfig(Strict):
    """The data of a training."""

    source: Place
    """Folder of captioned images or webdataset shards. For a distillation also `teacher` (images that the guided
    teacher samples) or `trajectories` (see `TrajectoryConfig`)."""

    count: int = Field(default=TEACHER_IMAGES, ge=1)
    """Number of images of source `teacher`, or of trajectories."""

    steps: int = Field(default=TEACHER_STEPS, ge=1)
    """Steps of each image of source `teacher`; of trajectories, solver steps, about."""

    solver: Literal["auto", "heun", "ddim", "dpmpp"] = "auto"
    """Solver of the teacher for trajectories; `auto` is Heun, or DPM-Solver++ where pure noise holds no signal."""

    guidance: AnyGuidance | None = None
    """Guidance of the teacher on trajectories; by default the method's."""

    seed: Annotated[int, AfterValidator(partial(require_seed, option="data.seed"))] | None = None
    """Seed of images and trajectories; by default the training's."""

    folder: Place | None = None
    """Folder that keeps trajectories, for other runs too; by default one in the run's own."""

    from_student: Place | None = None
    """Run whose student makes the trajectories, or `warm_start` for the first stage's student."""

    real: Place | None = None
    """Real images, as in `zoo.pixel_data.read_pixel_data`, that a student of a pixel model is measured against."""

    @model_validator(mode="after")
    def _student_walks(self) -> "DataConfig":
        for option in ("from_student", "guidance", "folder"):
            if (got := getattr(self, option)) is not None and self.source != "trajectories":
                raise ValueError(
                    f"data.{option}: got {got} with data.source={self.source}; "
                    "set data.source=trajectories, or leave it out"
                )
        return self


class FinetuneRecipe(Strict):
    """A recipe of `fewstep train-teacher`, of kind finetune."""

    kind: Literal["finetune"]
    """What the recipe is for."""

    name: Name
    """Name of the run, and of the run's folder."""

    teacher: Place
    """Bundled name, diffusers folder, hub id or checkpoint of the teacher."""

    data: DataConfig
    """The captioned images to train on."""

    roles: RolesConfig
    """Which weights are trained."""

    fit: FitConfig
    """Length and rates of the training."""

    drop_caption: float = Field(default=0.1, ge=0, le=1)
    """Share of captions that are left empty, for guidance."""

    seed: Annotated[int, AfterValidator(partial(require_seed, option="seed"))] = 0
    """Seed of every draw."""


class StageConfig(Strict):
    """A training that comes first: method, length and data.

    All other settings are those of the recipe.
    """

    method: AnyMethod
    """Method of the stage."""

    train: TrainConfig
    """Training of the stage."""

    data: DataConfig | None = None
    """Data of the stage."""

    size: Size | None = None
    """Height and width of the stage's images, or `WIDTHxHEIGHTxFRAMES` of its videos, if not those of the recipe."""


class DistillRecipe(Strict):
    """A recipe of `fewstep distill`."""

    kind: Literal["distill"]
    """What the recipe is for."""

    name: Name
    """Name of the run, and of the run's folder."""

    teacher: Place
    """Bundled name, diffusers folder, hub id or checkpoint of the teacher."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the base's weights. LoRA stays in single precision. The range of float16 loses gradients."""

    size: Size | None = None
    """Height and width of the images, or `WIDTHxHEIGHTxFRAMES` of videos, if not the teacher's own."""

    prompts: PromptsConfig = PromptsConfig()
    """The prompts to train on."""

    method: AnyMethod
    """The method, by name, and its settings."""

    roles: RolesConfig
    """Which weights are trained, and how the base is kept."""

    train: TrainConfig
    """Length, batches and rates of the training."""

    data: DataConfig | None = None
    """For methods that start from images or trajectories, and for the adversarial term; TDM needs prompts alone."""

    warm_start: StageConfig | None = None
    """A stage that comes first, whose student is continued (imitate, then match)."""

    init_from: Place | None = None
    """A run whose student is continued, instead of the teacher, or a `.safetensors` of somebody else's student."""

    preview: PreviewConfig = PreviewConfig()
    """The previews along the run."""

    evaluate: str | None = None
    """Protocol under which the finished student is measured."""

    @model_validator(mode="after")
    def _stages_fit(self) -> "DistillRecipe":
        """Check that the stages fit, before anything is generated or trained."""
        first = self.warm_start
        for place, method, train in (
            ("method", self.method, self.train),
            *([("warm_start.method", first.method, first.train)] if first is not None else []),
        ):
            require_roles(method.name, self.roles)
            require_per_step(method, self.roles, train.shard, place)
            require_updates(method, train.iterations)
            require_groups(method, train.batch)
            require_reward(method, None)
        if self.init_from is None:
            require_initial_student(
                self.method if self.warm_start is None else self.warm_start.method, "", False, "the teacher"
            )
        if self.warm_start is not None:
            own, most = self.warm_start.method, max(self.method.counts)
            require_same_steps(own, self.method, self.roles)
            require_initial_student(
                self.method, own.head if own.head in KINDS else "", own.analytic_first_step, "the first stage's student"
            )
            if self.method.init_head != "drop" and own.head in KINDS:
                require_steps(
                    own.head,
                    own.counts,
                    most,
                    "method.steps",
                    "set warm_start.method.steps to as many, or drop the head",
                )
        return self

    @property
    def real(self) -> str | None:
        """The real images to measure against, where a stage names some."""
        return next(
            (data.real for data in (self.data, self.warm_start and self.warm_start.data) if data and data.real), None
        )


def read_recipe(
    source: str, overrides: Sequence[str], model: type[Model], given: Mapping[str, str] = MappingProxyType({})
) -> Model:
    """Read the recipe named `source`, or the file `source`.

    `overrides` are texts `a.b=c`. `given` are settings with command-line options of their own, whose texts
    are taken literally, over the overrides. Raises ValueError with one line.
    """
    path = recipe_path(source)
    value = _yaml(path)
    before = {place: _settings(value, place).get("name", DEFAULT_METHOD) for place in ("method", "warm_start.method")}
    value = override(value, overrides, model)
    _require_new_keys(value, _where(str(path), overrides))
    for place, name in before.items():
        _require_settings(_settings(value, place), place, name, str(path))
    for key, text in given.items():
        if not text:
            raise ValueError(f"--{key.partition('.')[0]}: got an empty text; pass a value, or leave the option out")
        _put(value, key, text)
    return validate(value, model, str(path), overrides)


def _settings(value: Mapping[str, Any], place: str) -> Mapping[str, Any]:
    """Return the mapping at `a.b` of a recipe, or an empty one."""
    found: Any = value
    for part in place.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _require_settings(settings: Mapping[str, Any], place: str, before: Any, source: str) -> None:
    """Check that an overriding method takes the recipe's settings.

    Raises ValueError with the settings that the method does take, as one override.
    """
    name = settings.get("name", DEFAULT_METHOD)
    if name == before or name not in PRESETS:
        return
    known = {f.name for f in fields(PRESETS[name])}
    if odd := [key for key in settings if key not in known]:
        kept = {key: inner for key, inner in settings.items() if key in known}
        text = yaml.safe_dump(kept, default_flow_style=True, width=10**6, sort_keys=False).strip()
        raise ValueError(
            f"{place}.name: got {name}, which takes no {', '.join(odd)} as {source} has; "
            f"pass --set {shlex.quote(f'{place}={text}')} in its place"
        )


def _where(source: str, overrides: Sequence[str]) -> Callable[[str], str]:
    """Return a function that says where an option was written.

    An option is written in `source`, or with --set.
    """
    given = [item.partition("=")[0] for item in overrides]
    return lambda option: "--set" if any(option == key or option.startswith(f"{key}.") for key in given) else source


def _require_new_keys(value: Mapping[str, Any], where: Callable[[str], str], above: str = "", within: str = "") -> None:
    """Check that a recipe has no key of an earlier version.

    Raises ValueError with the key's present name.
    """
    for key, inner in value.items():
        name, shown_name = f"{above}{key}", f"{within}{above}{key}"
        old = name == "method.match" and isinstance(inner, str)
        new = "method.match.state" if old else RENAMED.get(name)
        if name == "method.head" and inner in INIT_HEAD:
            raise ValueError(
                f"{shown_name}: this option is called {within}method.init_head now, and {inner} is "
                f"{INIT_HEAD[inner]}; rename it in {where(shown_name)}, see docs/recipes.md"
            )
        if new is not None and not (name == "method.gan" and isinstance(inner, dict)):
            raise ValueError(
                f"{shown_name}: this option is called {within}{new} now; "
                f"rename it in {where(shown_name)}, see docs/recipes.md"
            )
        if isinstance(inner, dict):
            if key == "warm_start":
                _require_new_keys(inner, where, "", "warm_start.")
            else:
                _require_new_keys(inner, where, f"{name}.", within)


def recorded(recipe: BaseModel) -> dict[str, Any]:
    """Return a recipe as JSON values.

    File names are as they are in this locale.
    """
    return recipe.model_dump(mode="json")


def first_stage(recipe: DistillRecipe) -> DistillRecipe:
    """Return the recipe of the training that comes first.

    No protocol measures the first stage: the student is measured after the last stage.
    """
    assert recipe.warm_start is not None
    preview = recipe.preview.model_copy(update={"protocol": None})
    own = {
        "method": recipe.warm_start.method,
        "train": recipe.warm_start.train,
        "data": recipe.warm_start.data,
        "size": recipe.warm_start.size or recipe.size,
    }
    return recipe.model_copy(
        update={**own, "name": f"{recipe.name}, warm start", "warm_start": None, "evaluate": None, "preview": preview}
    )


def kind_of(source: str) -> str:
    """Return the `kind` that a recipe states."""
    return str(_yaml(recipe_path(source)).get("kind"))


class _Repeated(yaml.YAMLError):
    """A key that is there twice.

    YAML would keep the last value alone.
    """


class _Loader(yaml.SafeLoader):
    """YAML with booleans `true` and `false` alone, without repeated keys.

    `no` is a text, which `train.precision` takes.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Construct a mapping as YAML does.

        Raises `_Repeated` where a key comes again.
        """
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if (first := lines.get((key.tag, key.value))) is not None:
                raise _Repeated(f"{key.value} twice, in line {first} and in line {line}")
            lines[key.tag, key.value] = line
        return super().construct_mapping(node, deep)


# Numbers as people write them. YAML 1.1 would take `017` for 15, `1:30` for 90, and `1_0` for 10.
_WRITTEN = {
    "tag:yaml.org,2002:bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": ("[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        (
            r"[-+]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [known for known in resolvers if known[0] not in _WRITTEN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _WRITTEN.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def _value_of(text: str) -> Any:
    """Return the value that a YAML text holds.

    Raises whatever goes wrong, and ValueError where a few `&` and `*` would make more values than a recipe
    has.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _size(node, {})) > MOST:
            raise ValueError(f"its & and * make {size:,} values of it, a recipe has fewer than {MOST:,}")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values that a node stands for.

    Values that are named by `*` are counted again. Raises ValueError where a node holds itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("a value of it holds itself (& and *)")
        return known[id(node)]
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    known[id(node)] = size = 1 + sum(_size(part, known) for part in inner)
    return size


def _yaml(path: Path) -> dict[str, Any]:
    try:
        value = _value_of(text_in(path))
    except OSError as error:
        raise ValueError(f"recipe: cannot read {path} ({error.strerror}); check the path") from error
    except _Repeated as error:
        raise ValueError(f"recipe: {path} has {error}; the last one alone would count: keep one of them") from error
    except Exception as error:  # damaged files raise errors of many types
        raise unreadable(f"recipe: {path}", error, "correct it", "is not YAML") from error
    if not isinstance(value, dict):
        raise ValueError(f"recipe: {path} holds no settings; start from a shipped one, e.g. recipes/demo.yaml")
    return value


def override(value: dict[str, Any], overrides: Sequence[str], model: type[BaseModel]) -> dict[str, Any]:
    """Put the value of each override `a.b=c` in its place.

    Only the place `a.b` changes, also where YAML's `*` made several places the same object. Where the
    `model` takes a text, c is taken literally, and `null` leaves out what may be left out. All else is read
    as YAML.

    Raises ValueError.
    """
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise ValueError(f"--set: got {item!r}, allowed is OPTION=VALUE, e.g. --set train.lr=1e-5")
        kinds = [_text(annotation) for annotation in annotations_of(model, key.split("."))]
        if any(kinds):
            _put(value, key, None if "optional" in kinds and text in ("", "null") else text)
            continue
        try:
            what = _value_of(text)
        except Exception as error:  # as for a recipe
            raise ValueError(f"--set: the value of {key} is not YAML ({shown(text)}: {reason(error)})") from error
        _put(value, key, what)
    return value


def _put(value: dict[str, Any], key: str, what: Any) -> None:
    place: Any = value
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(place, dict):
            below = place.get(parent, {})
            below = _number_as(NUMBERS[parent], below) if parent in NUMBERS else below
            place[parent] = dict(below) if isinstance(below, dict) else below
        place = place[parent] if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise ValueError(f"--set: {key} leads into a plain value; check the recipe's keys with --dry-run")
    place[last] = what


def _kinds(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows, one by one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def annotations_of(kind: Any, keys: Sequence[str]) -> Iterator[Any]:
    """Yield the annotations of the field at `keys` below a model.

    `kind` is a model, a dataclass or a union of them. Every kind that has the field yields one annotation.
    """
    for part in _kinds(kind):
        if not isinstance(part, type):
            continue
        if issubclass(part, BaseModel):
            fields: Mapping[str, Any] = {name: field.annotation for name, field in part.model_fields.items()}
        else:
            fields = get_type_hints(part, include_extras=True) if is_dataclass(part) else {}
        if keys[0] in fields:
            yield from annotations_of(fields[keys[0]], keys[1:]) if len(keys) > 1 else [fields[keys[0]]]


def _text(annotation: Any) -> Literal["text", "optional", ""]:
    """Return whether a field takes text alone, and may be omitted.

    `text` is for a field that takes text alone, `optional` for one that may also be left out, and an empty
    text is for all others.
    """
    kinds = _kinds(annotation)
    own = [k for k in kinds if k is not NoneType]
    if not all(k is str or (get_origin(k) is Literal and all(isinstance(v, str) for v in get_args(k))) for k in own):
        return ""
    return "text" if len(own) == len(kinds) else "optional"


def validate(value: dict[str, Any], model: type[Model], source: str, overrides: Sequence[str] = ()) -> Model:
    """Check that `value` is a recipe of this kind.

    Returns the recipe. `overrides` were not written in `source` but with --set.

    Raises ValueError with the first mistake, on one line.
    """
    kinds = {
        "distill": "fewstep distill",
        "teacher": "fewstep train-teacher",
        "pixel-teacher": "fewstep train-teacher",
        "finetune": "fewstep train-teacher",
    }
    kind, expected = value.get("kind"), model.model_fields["kind"].annotation
    if isinstance(kind, str) and kind in kinds and kind not in str(expected):
        raise ValueError(f"recipe: {source} is of kind {kind}; run: {kinds[kind]} {source}")

    where = _where(source, overrides)
    _require_no_boolean(value, model, where)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"] if part not in METHODS)
        if first["type"] == "value_error":
            raise ValueError(_named(str(first["ctx"]["error"]), option)) from error
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            raise ValueError(
                f"{option}: unknown option in {where(option)}; "
                f"allowed here are {', '.join(_siblings(model, first['loc'][:-1]))}"
            ) from error
        got = "" if first["type"] == "missing" else f", got {shown(first['input'])}"
        raise ValueError(f"{option}: {first['msg'][0].lower()}{first['msg'][1:]}{got} (in {where(option)})") from error


def _named(text: str, place: str) -> str:
    """Name the option in an error from the recipe's top.

    `text` is the error of a settings class; `place` is where the class stands in the recipe.
    """
    option = text.partition(":")[0]
    for i, part in enumerate(parts := place.split(".")):
        if option.startswith(f"{part}."):
            return ".".join([*parts[:i], text])
    return text


def _require_no_boolean(
    value: Mapping[str, Any], model: type[BaseModel], where: Callable[[str], str], parents: tuple[str, ...] = ()
) -> None:
    """Check that numbers are numbers, not booleans or texts.

    `true` in the place of a number is a slip of the pen, and not 1 as in Python. Raises ValueError for the
    first such value.
    """
    for key, inner in value.items():
        place = (*parents, str(key))
        option = ".".join(place)
        if isinstance(inner, dict):
            _require_no_boolean(inner, model, where, place)
            continue
        own = [kind for annotation in annotations_of(model, place) for kind in _kinds(annotation)]
        kinds = {k for kind in own for k in (kind, *_inner(kind))}
        text = next((v for v in (inner if isinstance(inner, list) else [inner]) if isinstance(v, str)), None)
        if text is not None and {int, float} & kinds and not any(k is str or isinstance(k, str) for k in kinds):
            raise ValueError(f"{option}: input should be a number, got {shown(text)} (in {where(option)})")
        odd = next((v for v in (inner if isinstance(inner, list) else [inner]) if isinstance(v, bool)), None)
        if odd is not None and kinds and bool not in kinds:
            wanted = "a number" if {int, float} & kinds else "a text"
            raise ValueError(f"{option}: input should be {wanted}, got {str(odd).lower()} (in {where(option)})")


def _inner(kind: Any) -> list[Any]:
    """Return the types of a type's elements."""
    return [k for part in get_args(kind) for k in _kinds(part)]


def _siblings(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the options that one part of the recipe takes.

    `location` is where the part stands in the recipe.
    """
    annotation: Any = model
    for part in location:
        if part in METHODS:
            annotation = METHODS[str(part)]
            continue
        fields = getattr(annotation, "model_fields", None) or getattr(annotation, "__dataclass_fields__", {})
        field = fields.get(str(part))
        annotation = None if field is None else getattr(field, "annotation", None) or getattr(field, "type", None)
    fields = getattr(annotation, "model_fields", None) or getattr(annotation, "__dataclass_fields__", {})
    return sorted(fields)
