"""What runs in VBench's environment, one program for each dimension.

VBench 0.1.5 reads from a file which clips a dimension is of, and what their prompts name. The file is made here, of the
clips at hand, so that all its dimensions take any clips of its prompts. Its networks are loaded once: VBench loads them
for every call, and a process has one dimension.
"""

from .scorer import ACTIONS, OBJECTS

LIST = "vbench"  # of prompts
CODE = """
import importlib, json, os, shutil, tempfile
import torch, vbench
from vbench import VBench
dimension, prompted = {dimension!r}, {prompted!r}
def once(load):
    kept = []
    def first(*args, **options):
        if not kept:
            kept.append(load(*args, **options))
        return kept[0]
    return first
module = importlib.import_module("vbench." + dimension)
if "DenseCaptioning" in vars(module):
    for name in ("initialize_model", "initialize_model_det"):
        setattr(module.DenseCaptioning, name, once(getattr(module.DenseCaptioning, name)))
for name in ("MotionSmoothness", "DynamicDegree", "MUSIQ", "get_aesthetic_model", "DenseCaptioning",
             "tag2text_caption", "ViCLIP", "SimpleTokenizer", "create_model"):
    if name in vars(module):
        setattr(module, name, once(vars(module)[name]))
if "clip" in vars(module):
    module.clip.load = once(module.clip.load)
if dimension == "human_action":
    torch.load = once(torch.load)
torch.hub.load = once(torch.hub.load)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
scale = 100 if dimension == "imaging_quality" else 1
known = {{}}
if prompted:
    with open(os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json"), encoding="utf-8") as file:
        known = {{one["prompt_en"]: one for one in json.load(file) if dimension in one["dimension"]}}
def score(paths, prompts):
    with tempfile.TemporaryDirectory() as out:
        asked, clips = [], []
        for i, (path, prompt) in enumerate(zip(paths, prompts)):
            clips.append(path)
            if dimension == "human_action":  # which reads the action from the file's name
                clips[i] = os.path.join(out, prompt.replace("/", " ") + "-" + str(i) + ".mp4")
                shutil.copyfile(path, clips[i])
            if not prompted or prompt in known:
                about = dict(known.get(prompt, {{"prompt_en": prompt}}), dimension=[dimension], video_list=[clips[i]])
                asked.append(about)
        with open(os.path.join(out, "asked.json"), "w", encoding="utf-8") as file:
            json.dump(asked, file)
        judge, found = VBench(device, "", out), {{}}
        judge.build_full_info_json = lambda *args, **options: os.path.join(out, "asked.json")
        try:
            if asked:
                judge.evaluate(out, "x", dimension_list=[dimension])
                with open(os.path.join(out, "x_eval_results.json")) as file:
                    each = json.load(file)[dimension][1]
                found = {{one["video_path"]: float(one["video_results"]) / scale for one in each}}
        except ZeroDivisionError:  # color, where none of the clips shows its object
            pass
    return [found.get(clip, float("nan")) for clip in clips]
"""


def code_of(dimension: str) -> str:
    """Return the program of a dimension."""
    return CODE.format(dimension=dimension, prompted=dimension in ACTIONS + OBJECTS)
