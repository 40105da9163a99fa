"""Algorithm 1 of the paper, as a script: read it, run it, change a line, run it again (with another --out).

    python -m purecc_min.algorithm                                 learns the robot in measure/references
    python -m purecc_min.algorithm photos/ --class-word robot      learns from your own pictures

Stage 1 (the paper's lines 1-7) teaches the representation extractor theta_1 on the flow-matching loss. Stage
2 (lines 8-18) teaches theta_2 with L_PCC. `learn FOLDER --class-word WORD --method paper` trains in the same
way; it also crops pictures, reads masks, can be resumed, and measures the result. Read next: methods.py.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from purecc_min.branch import Branch
from purecc_min.concept import TOKEN, ConceptSet, Reference, base_text, encode
from purecc_min.embeddings import class_word_states
from purecc_min.objective import pcc_loss
from purecc_min.train import TrainConfig, draw_batch, generator_for, optimizer_for, update
from tinyflow.errors import InputError
from tinyflow.flow import squared_error
from tinyflow.picturebook.model import load_tiny

ROBOT = Path(__file__).parent / "measure" / "references" / "checked_robot"
parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
parser.add_argument("folder", type=Path, nargs="?", default=ROBOT, help="PNG pictures, with a .txt for each")
parser.add_argument("--class-word", default="robot", help="an ordinary word for the kind of thing [V] is")
parser.add_argument("--steps", type=int, default=200, help="training steps in each stage")
parser.add_argument("--out", type=Path, default=Path("output/algorithm"), help="folder for the results")
options = parser.parse_args()
if options.out.exists():
    parser.error(f"--out {options.out} is there already; choose another")

# ----------------------------------------------------------------------- the base model and the references
pipe, word = load_tiny(), options.class_word
references, size = [], (pipe.picture_size, pipe.picture_size)
for file in sorted(options.folder.glob("*.png")):
    picture = Image.open(file).convert("RGB").resize(size, Image.Resampling.BOX)
    if not file.with_suffix(".txt").is_file():
        parser.error(f"{file} has no text; write one into {file.stem}.txt")
    complete = file.with_suffix(".txt").read_text(encoding="utf-8").strip()     # "a [V] robot in the desert"
    references.append(Reference(file.name, np.asarray(picture)[None], complete, base_text(complete),
                                f"{TOKEN} {word}"))
if not references:
    parser.error(f"{options.folder} has no PNG pictures")
try:
    data = encode(pipe, ConceptSet(word, references))    # x_0; y_complete, y_base, y_tar and the empty text
except InputError as error:
    parser.error(str(error))

# ------------------------------------------------------------- stage 1: the representation extractor, theta_1
config = TrainConfig(steps=options.steps, learning_rate=2e-3)
generator = generator_for(config.seed, 1, step=-1)
Y = class_word_states(pipe, data, generator)             # the initial {Y^l}: see embeddings.py
theta_1 = Branch.fresh(pipe, Y, config.rank, generator)  # with adapters that change nothing yet
optimizer = optimizer_for(theta_1, config)
for step in tqdm(range(config.steps), "stage 1: theta_1"):
    batch = draw_batch(data, config, 1, step, pipe.shift)                               # x_t, t, v, texts
    v_complete = theta_1(batch.x_t, batch.t, batch.texts.complete)                      # Eq. 7
    update(theta_1, optimizer, squared_error(v_complete, batch.v))                      # Eq. 3
theta_1.requires_grad_(False)                            # frozen from here on

# --------------------------------------------------------------------------- stage 2: pure learning, theta_2
config = TrainConfig(steps=options.steps, learning_rate=1e-3)
Y = theta_1.state_dict()["embeddings.Y"]                # as trained; theta_2 gets a copy
theta_2 = Branch.fresh(pipe, Y, config.rank, generator_for(config.seed, 2, step=-1))
optimizer = optimizer_for(theta_2, config)
for step in (bar := tqdm(range(config.steps), "stage 2: theta_2")):
    batch = draw_batch(data, config, 2, step, pipe.shift)
    loss, terms = pcc_loss(theta_1, theta_2, batch, config.eta)                         # Eq. 8 to 15
    update(theta_2, optimizer, loss)
    bar.set_postfix({"mean lambda*": f"{terms.lam.mean():.2f}", "L_PureCC": f"{terms.loss_purecc:.4f}"})

# ------------------------------------------------------------------------------------------ draw, and save
texts = [f"a small {TOKEN} {word} on the left at night", f"a big {TOKEN} {word} on the right in the meadow",
         f"a big {TOKEN} {word} on the left and a small {word} on the right in the room",
         f"a big {word} on the left in the room"]
text = pipe.encode_text(texts, {TOKEN: word})
rows = []
for theta in (pipe.velocity, theta_1, theta_2):          # the base model knows only the class word
    x_0 = pipe.sample(text, seeds=list(range(len(texts))), theta=theta, theta_null=pipe.velocity)
    rows.append(np.concatenate(pipe.decode_images(x_0), axis=1))
options.out.mkdir(parents=True, exist_ok=True)
page = Image.fromarray(np.concatenate(rows))             # a column for each text, a row for each model
page.resize((3 * page.width, 3 * page.height), Image.Resampling.NEAREST).save(options.out / "pictures.png")
theta_2.save(options.out / "concept.safetensors", {"class_word": word, "rank": config.rank})
print(f"{options.out}/pictures.png: rows are the base model, theta_1 and theta_2; columns are\n  "
      + "\n  ".join(texts))
