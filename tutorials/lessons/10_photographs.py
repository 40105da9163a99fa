# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10 · Photographs on Stable Diffusion 3.5
#
# **From a folder of photographs to a concept that other programs can load, step by step**
#
# So far the world was small enough for a laptop. The same classes load the public weights of Stable Diffusion
# 3.5 Medium, the model that the paper customizes. What changes is everything *around* the method: three text
# encoders, an autoencoder, a shift of the times, half precision, and a card whose memory has an end. In this
# lesson you write these parts, and then all of them run together, from pictures to an exported file.
#
# **When you are through, you have written**
#
# 1. the text stream of SD3.5, its latents, and a cache of both in which no picture gets another one's text;
# 2. the shifted times of training and sampling;
# 3. a count of a step's memory, gradient checkpointing, a training step for fp16, and the export to
# diffusers;
#
# **and you can say** what fills a card in each stage, why a wrong pairing and a forgotten scale never raise
# an error, and what a LoRA file cannot carry.
#
# **What runs here, and what that shows.** The real weights are 16.3 GB and need a card. Here a *tiny random
# model* runs end to end. It lies on the disk in the public layout, file by file and name by name, and the
# package loads it like the real one. So this lesson shows that formats, shapes, order, memory and arithmetic
# are right. It shows **nothing about quality**: a random model draws noise, whatever it has learned.
#
# | | |
# |---|---|
# | Time | an hour of reading, 2 to 3 hours with the exercises; about a minute of computing on two CPU cores; no GPU |
# | Needs | lessons 1 to 6; and `pip install tokenizers`, which reads T5's vocabulary |
# | Keep open | [`tinyflow/sd3/README.md`](../../tinyflow/sd3/README.md), [`train.py`](../../purecc_min/train.py) and [`memory.py`](../../purecc_min/commands/memory.py), **after** you have tried |
# | Read after | the model's own page, and its licence |
#
# An exercise is a function whose body is blank, and the cell below it is its check. Hints are folded; the
# solved notebook is in [`../solved`](../solved). One star is a warm-up, three stars are hard.

# %% [markdown] tags=["slide"]
# # 10 · Photographs on Stable Diffusion 3.5
#
# From a folder of photographs to a file that other programs can load. Everything runs here on a tiny random
# model in the public layout: that shows layout, memory and formats, and nothing about quality.

# %%
import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path.cwd().parents[1]))   # the repository, two folders up

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

from purecc_min.branch import Branch, Thetas
from purecc_min.commands.export import export_lora
from purecc_min.commands.folder import load_concept
from purecc_min.commands.memory import REFERENCES, TOKENS, dry_run, fit, flash_attention
from purecc_min.concept import Texts, noised
from purecc_min.concept import encode as encode_set
from purecc_min.embeddings import class_word_states
from purecc_min.learning import concept_facts, train_steps
from purecc_min.lora import LoRA
from purecc_min.measure.toy import CONCEPTS, FOLDER
from purecc_min.methods import l_cc
from purecc_min.registry import METHODS
from purecc_min.train import SCALE, TrainConfig, draw_batch, optimizer_for
from tinyflow import flow
from tinyflow.mmdit import MMDiT, position_features
from tinyflow.pipeline import Text, to_pictures
from tinyflow.sd3.checkpoint import take
from tinyflow.sd3.layouts import DIFFUSERS, clip_layers, mmdit_layers, t5_layers, vae_layers
from tinyflow.sd3.load import LAST_TIME, SD35_MEDIUM, SHIFT, load_sd3
from tinyflow.sd3.t5 import T5Config, T5Encoder
from tinyflow.text import TextConfig, TextEncoder
from tinyflow.vae import VAE, VAEConfig
from tinyflow.weights import tensor_hash
from tutorials.course import BLUE, CORAL, GOLD, GREY, INK, YourTurn, expect, expect_close, show


def seeded(seed):
    return torch.Generator().manual_seed(seed)

def values(module):
    return sum(p.numel() for p in module.parameters())

# %% [markdown]
# ## 1 · The weights
#
# Stable Diffusion 3.5 Medium is not one network but five. On the *meta* device a network has shapes and no
# numbers, so we can build all five at full size here and count them.

# %%
with torch.device("meta"):
    real = {"MMDiT": MMDiT(SD35_MEDIUM), "VAE": VAE(),
            "CLIP-L": TextEncoder(TextConfig(49408, 77, 768, 12, 12, 3072, 768)),
            "CLIP-G": TextEncoder(TextConfig(49408, 77, 1280, 32, 20, 5120, 1280)),
            "T5-XXL": T5Encoder(T5Config())}
stored = {name: 2 * values(module) / 1e9 for name, module in real.items()}          # GB, 2 bytes a number
stored["MMDiT"] += 2 * 384**2 * SD35_MEDIUM.width / 1e9                             # its positions, too
folders = ["transformer/", "vae/", "text_encoder/", "text_encoder_2/", "text_encoder_3/"]
print(f"{'':10s}{'folder':18s}{'numbers':>15s}{'GB in bf16':>12s}")
for (name, size), folder in zip(stored.items(), folders):
    print(f"{name:10s}{folder:18s}{values(real[name]):15,d}{size:12.2f}")
print(f"{'all':28s}{sum(map(values, real.values())):15,d}{sum(stored.values()):12.2f}")
plt.figure(figsize=(6.2, 1.8), layout="constrained")
plt.barh(list(stored), list(stored.values()), color=[BLUE, GREY, GOLD, GOLD, GOLD])
plt.gca().invert_yaxis()
plt.xlabel("GB on the disk: blue draws, gold reads the text")
plt.show()
assert values(real["MMDiT"]) == 2_243_171_520 and values(real["T5-XXL"]) == 4_762_310_656
assert 16 < sum(stored.values()) < 17 and stored["T5-XXL"] > sum(stored.values()) / 2

# %% [markdown]
# More than half of the download is T5, which only reads. You may leave `text_encoder_3/` and `tokenizer_3/`
# out; then its 256 tokens are zeros. That saves 9.5 GB on the disk; what it costs in pictures is not measured
# here.
#
# **How to get them.** The repository `stabilityai/stable-diffusion-3.5-medium` is *gated*: make an account at
# Hugging Face, read and accept the Stability Community Licence on the model's page (it says who may use the
# weights for what), make an access token, and then:
#
# ```
# pip install huggingface_hub
# hf auth login
# hf download stabilityai/stable-diffusion-3.5-medium --local-dir DIR \
#     --exclude "*.jpg" "sd3.5_medium*" "text_encoders/*"
# ```
#
# Without the login you receive a web page in place of a file. The package recognises that, and says so.
#
# **One thing is in Medium that the tiny model lacks.** In its first 13 blocks the image tokens attend a second
# time, to image tokens alone, with projections of their own, and adaLN makes nine tensors there instead of six:
# shift, scale and gate for that attention, too. What it adds goes to `x` beside what the joint attention adds.
# Text tokens take no part in it. The few lines are in `Block` in `tinyflow/mmdit.py`, and the adapters leave
# that attention alone.
#
# Now the tiny random model. The cell below writes our classes to a folder under the **public names**. The
# rename table `mmdit_layers` says, for each of our layers, what diffusers calls it; `[swap]` behind a name
# says that its two halves are exchanged: we keep shift and scale, diffusers keeps scale and shift. An
# exchange that is forgotten fits in every shape and ruins every picture.

# %% [markdown] tags=["slide"]
# ## Five networks, 16 GB
#
# ![](last)
#
# One draws, one sees, three read. The repository is gated: accept the licence, log in, download.

# %%
def randomise(module, seed):                     # no gate stays closed: all parts have to compute
    generator = seeded(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            norm = "norm" in name and name.endswith("weight") and p.ndim == 1
            p.copy_(norm + 0.1 * torch.randn(p.shape, generator=generator))
    return module

def write(folder, stem, module, layers, config={}, **more):
    tensors = {}
    for name, tensor in module.state_dict().items():
        layer, _, last = name.rpartition(".")
        theirs, _, how = layers[layer].removesuffix("]").partition("[")
        tensors[f"{theirs}.{last}"] = take(tensor, how).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors | more, folder / f"{stem}.safetensors")
    (folder / "config.json").write_text(json.dumps(config))

def write_clip_vocabulary(folder, words):        # CLIP's bytes, and merges that make a word one token
    letters = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    pairs = dict.fromkeys((word[:n], letters[word][n]) for word in words for n in range(1, len(word)))
    alphabet, others = ByteLevel.alphabet(), iter(range(256, 512))       # a visible character for each byte
    symbols = [chr(n if chr(n) in alphabet else next(others)) for n in range(256)]
    tokens = dict.fromkeys([*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, pairs)])
    ids = {token: n for n, token in enumerate(tokens)} | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(map(" ".join, pairs)))

def write_t5_vocabulary(folder, words):
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    pieces = [("<pad>", 0), ("</s>", 0), ("<unk>", 0), ("▁", -2), *(("▁" + word, -3) for word in words)]
    pieces += [(letter, -6) for letter in "abcdefghijklmnopqrstuvwxyz"]
    model = {"type": "Unigram", "unk_id": 2, "byte_fallback": False, "vocab": pieces}
    whole = dict.fromkeys(["truncation", "padding", "normalizer", "post_processor"])
    whole |= {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": space, "decoder": space}
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    return len(pieces)

tiny = replace(SD35_MEDIUM, width=32, depth=3, heads=2, context_width=80, pooled_width=56, max_grid=12,
               base_grid=12, dual_attention_layers=(0, 1))

def write_public(folder, words):
    positions = position_features(tiny.width, 12, 12).flatten(0, 1)[None].contiguous()
    write(folder / "transformer", "diffusion_pytorch_model", randomise(MMDiT(tiny), 1),
          mmdit_layers(DIFFUSERS, tiny.depth), **{"pos_embed.pos_embed": positions})
    vae = VAE(VAEConfig((8, 16, 16, 16), layers=1, groups=4))
    write(folder / "vae", "diffusion_pytorch_model", randomise(vae, 2), vae_layers(DIFFUSERS, 4, 1),
          {"norm_num_groups": 4, "scaling_factor": vae.config.scale, "shift_factor": vae.config.shift})
    for name, width in (("", 24), ("_2", 32)):
        clip = TextEncoder(TextConfig(49408, 77, width, 2, 4, 2 * width, width))
        write(folder / f"text_encoder{name}", "model", randomise(clip, width), clip_layers(2),
              {"num_attention_heads": 4})
        write_clip_vocabulary(folder / f"tokenizer{name}", words)
    count = write_t5_vocabulary(folder / "tokenizer_3", words)
    t5 = randomise(T5Encoder(T5Config(count, 80, 2, 4, 8, 96)), 5)
    write(folder / "text_encoder_3", "model", t5, t5_layers(2, "shared"))

size = 64                                        # pixels a side; 512 for the real model
word = CONCEPTS["checked_robot"].class_word
concept = load_concept(FOLDER / "checked_robot", word, size, variants=8)    # each with seven crops
n = len(concept.references)
said = " ".join([word, "on left snow", *(ref.base for ref in concept.references)])
words = sorted(set(said.lower().split()))

work = TemporaryDirectory()
DIR = Path(work.name) / "sd3"
write_public(DIR, words)
pipe = load_sd3(DIR, size=size, dtype=torch.float32)         # the very call that loads the real weights
for path in sorted(DIR.glob("*/*")):
    print(f"{path.relative_to(DIR).as_posix():58s}{path.stat().st_size:>12,d} bytes")
table = mmdit_layers(DIFFUSERS, tiny.depth)
for ours in ("blocks.0.attention.image.to_q", "blocks.0.attention.text.to_out", "final_adaln.linear"):
    print(f"{ours:34s}{table[ours]}")
some = [ref.pictures[k] for ref in concept.references for k in (0, 1, 2)][:6]
show(some, ["a reference", "a crop", "a crop"] * 2)

# %% [markdown]
# `learn` reads your own photographs in the same way (three to five pictures; a text in a `.txt` file beside
# each). Every photograph is cut to a square, and seven random crops of it are made, half of them mirrored. So
# a model sees the concept at several places, and cannot learn one frame by heart. (A concept with writing on
# it, or with a left and a right side, suffers from mirroring.)
#
# ## 2 · Three encoders read every text
#
# | | what it is | gives | tokens |
# |---|---|---|---|
# | CLIP-L | was trained to match pictures with texts | states of width 768, and one vector for the whole text | 77 |
# | CLIP-G | the same, larger | states of width 1280, and one vector | 77 |
# | T5-XXL | a language model, never saw a picture | states of width 4096 | 256 |
#
# The CLIPs know what things look like; T5 knows what long sentences mean. Their states become the *context*,
# the text tokens of the MMDiT; the CLIPs' vectors become *pooled*, which speaks through adaLN (lesson 2).
#
# ```
#               width 4096
#    77 tokens  [ CLIP-L 768 | CLIP-G 1280 | zeros 2048 ]        pooled = [ CLIP-L 768 | CLIP-G 1280 ]
#   256 tokens  [              T5 4096                  ]
# ```
#
# The two CLIPs read the *same* 77 tokens, so their states stand side by side. T5 cuts the text in another
# way, so its tokens come after them. The empty text of guidance goes through all three, too; it is not a row
# of zeros.
#
# ### Exercise 10.1 ★ · One text stream from three

# %% [markdown] tags=["slide"]
# ## Three encoders read every text
#
# ```
#  77 tokens  [ CLIP-L 768 | CLIP-G 1280 | zeros 2048 ]
# 256 tokens  [              T5 4096                  ]
# ```
#
# CLIP was trained on pictures and texts, T5 on texts alone. [V] has a slot in both parts.

# %% tags=["exercise"]
def join(clip_l, clip_g, t5, pooled_l, pooled_g):
    # clip_l [B, 77, .], clip_g [B, 77, .], t5 [B, 256, W]; pooled_l, pooled_g [B, .]
    # -> context [B, 77 + 256, W], pooled [B, .]
    # BEGIN SOLUTION 10.1
    clip = torch.cat([clip_l, clip_g], dim=-1)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))                  # zeros behind
    return torch.cat([clip, t5], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)
    # END SOLUTION

# %% tags=["wrong"]
def join(clip_l, clip_g, t5, pooled_l, pooled_g):            # one encoder after the other
    wide = [F.pad(x, (0, t5.shape[-1] - x.shape[-1])) for x in (clip_l, clip_g, t5)]
    return torch.cat(wide, dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Side by side is `dim=-1`, one after the other is `dim=1`. `F.pad(x, (0, k))` puts $k$ zeros behind the last
# axis.
# </details>

# %% tags=["check"]
asked = [concept.references[0].complete, ""]
ids, slots, _ = pipe.tokenizer(asked, {"[V]": word})         # the encoders read the class word at [V]
ids_l, ids_g, ids_t5 = ids.split([77, 77, 256], dim=1)
(context_l, pooled_l), (context_g, pooled_g) = pipe.encoder.clip_l(ids_l), pipe.encoder.clip_g(ids_g)
states_t5 = pipe.encoder.t5(ids_t5)
context, pooled = join(context_l, context_g, states_t5, pooled_l, pooled_g)
theirs = pipe.encode_text(asked, {"[V]": word})
expect(context.shape[1] == 333, "CLIP-L and CLIP-G read the same 77 tokens: put their states side by side.")
expect(not torch.allclose(context[:, :256], states_t5), "CLIP's 77 tokens come first, then T5's 256.")
expect_close(context, theirs.context, "context")
expect_close(pooled, theirs.pooled, "pooled")
print(f"10.1 right: context {list(context.shape)}, pooled {list(pooled.shape)}")

# %%
tokens_l = pipe.tokenizer.clip_l.tokens(asked[0].replace("[V]", word))
print("CLIP reads:", " ".join(token.removesuffix("</w>") for token in tokens_l))
print("slots of [V]:", slots[0].nonzero().flatten().tolist(), "of", slots.shape[1], "   in the empty text:",
      slots[1].nonzero().flatten().tolist())
figure, axis = plt.subplots(figsize=(7.4, 2.3), layout="constrained")
axis.imshow(context[0].abs().T.clamp(max=2).numpy(), cmap="Blues", aspect="auto")
for place in slots[0].nonzero().flatten().tolist():
    axis.axvline(place, color=CORAL, lw=1)
axis.axvline(76.5, color=INK, lw=1)
axis.set(title="the context of one text: size of the states, and the slots of [V] (red)", xlabel="token",
         ylabel="channel", xticks=[0, 77, 200, 332])
plt.show()
in_clip, in_t5 = (slots[0, :77] > 0).sum(), (slots[0, 77:] > 0).sum()
assert in_clip == in_t5 == asked[0].count("[V]") and not slots[1].any()

# %% [markdown]
# [V] has a slot in **both** parts, and $Y^l$ stands in both. If it stood in CLIP's only, T5's token would go
# on saying "any robot" beside it. The white corner below the CLIP tokens is the padding with zeros.
#
# ## 3 · Latents
#
# The flow of SD3.5 does not run on pixels. An autoencoder, the VAE, makes of a picture a *latent* with 16
# channels and an eighth of the width and height. Pixels enter it as numbers in $[-1, 1]$. Its encoder
# describes a normal distribution by mean and log-variance, and we take the mean. One step is left, and it is
# often forgotten:
#
# $$x_0 = (\text{mean} - \text{shift}) \cdot \text{scale}, \qquad \text{mean} = x_0 / \text{scale} + \text{shift},
# \qquad \text{shift} = 0.0609, \; \text{scale} = 1.5305.$$
#
# Why? Eq. 1 mixes $x_0$ with noise of mean 0 and variance 1. The two numbers give latents about that mean and
# variance, and with such latents the model was trained. Nothing fails without them: shapes fit, the loss
# falls. The first SD3 trainers of diffusers forgot the shift (#8708).
#
# ```
#  uint8 [H, W, 3] --/127.5 - 1--> pixels --encoder--> mean --(mean - shift) * scale--> x_0 [16, H/8, W/8]
# ```
#
# ### Exercise 10.2 ★ · Into the latents and back

# %% tags=["exercise"]
def encode(codec, pictures):
    # uint8 [B, H, W, 3] -> x_0 [B, C, H/8, W/8]. codec.encoder(pixels): [B, 2C, .., ..], mean, log-variance
    # codec.config.shift and codec.config.scale are given
    # BEGIN SOLUTION 10.2
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    mean, _ = codec.encoder(pixels).chunk(2, dim=1)
    return (mean - codec.config.shift) * codec.config.scale
    # END SOLUTION

def decode(codec, x_0):
    # x_0 -> pixels [B, 3, H, W], about in [-1, 1]; codec.decoder takes a mean
    # BEGIN SOLUTION 10.2
    return codec.decoder(x_0 / codec.config.scale + codec.config.shift)
    # END SOLUTION

# %% tags=["wrong"]
def encode(codec, pictures):                     # forgets the shift
    mean, _ = codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, dim=1)
    return mean * codec.config.scale

def decode(codec, x_0):
    return codec.decoder(x_0 / codec.config.scale)

# %% tags=["wrong"]
def encode(codec, pictures):                     # pixels in [0, 1]
    mean, _ = codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 255).chunk(2, dim=1)
    return (mean - codec.config.shift) * codec.config.scale

def decode(codec, x_0):
    return codec.decoder(x_0 / codec.config.scale + codec.config.shift)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `chunk(2, dim=1)` cuts the channels in half. The way back undoes the steps in the opposite order: first
# divide by the scale, then add the shift.
# </details>

# %% tags=["check"]
pictures = torch.tensor([r.picture.tolist() for r in concept.references], dtype=torch.uint8).numpy()
with torch.no_grad():
    yours, ours = encode(pipe.codec, pictures), pipe.encode_images(pictures)
    off = yours - ours if yours.shape == ours.shape else torch.ones(1)
    expect((off - pipe.codec.config.shift * pipe.codec.config.scale).abs().max() > 1e-3,
           "every latent is too large by shift * scale: subtract the shift before you multiply.")
    in_0_1 = pipe.codec.encode(torch.tensor(pictures).permute(0, 3, 1, 2) / 255)
    expect(yours.shape != in_0_1.shape or not torch.allclose(yours, in_0_1, atol=1e-3),
           "these are the latents of pixels in [0, 1]; the VAE was trained on pixels in [-1, 1].")
    expect_close(yours, ours, "encode(codec, pictures)", tolerance=1e-3)
    expect_close(decode(pipe.codec, ours), pipe.codec.decode(ours), "decode(codec, x_0)", tolerance=1e-3)
print(f"10.2 right: {list(pictures.shape)} uint8 -> x_0 {list(yours.shape)}, "
      f"{pictures[0].size / yours[0].numel():.0f} times fewer numbers")

# %%
def grey(x):                                     # one channel as a picture
    x = (x - x.min()) / (x.max() - x.min())
    return (255 * x).byte().numpy()[..., None].repeat(3, axis=-1)

with torch.no_grad():
    x_0 = encode(pipe.codec, pictures)
    back = to_pictures(decode(pipe.codec, x_0[:1]))[0]
show([pictures[0], *(grey(x_0[0, k]) for k in (0, 5, 10, 15)), back],
     ["a picture", *(f"channel {k}" for k in (0, 5, 10, 15)), "decoded"])

# %% [markdown]
# The last picture is what a *random* decoder makes of it: the plainest reminder of what this lesson does not
# show. The real VAE was trained to give the first picture back.

# %% [markdown] tags=["slide"]
# ## Latents
#
# $$x_0 = (\text{mean} - 0.0609) \cdot 1.5305$$
#
# ![](last)
#
# Forgotten, nothing fails: shapes fit, and the loss falls.

# %% [markdown]
# ## 4 · A cache, and a bug that never raises an error
#
# The text encoders weigh 11 GB, and they say the same in every step. So we encode every text and every
# picture **once**, before training, and the encoders never have to share the card with a step. (The authors'
# released code keeps them on the card, and encodes everything anew in each step.) A cache has one duty: **row
# $i$ of everything belongs to reference $i$.** Below is a cache as one writes it. It runs, and the loss
# falls. Read it before you look at what it does.

# %%
def loader(epoch):                               # the references, shuffled anew in every epoch
    return [concept.references[i] for i in torch.randperm(n, generator=seeded(epoch)).tolist()]

with torch.no_grad():
    cache = [encode(pipe.codec, ref.pictures[:1])[0] for ref in loader(0)]      # once, before training

def pairs(cache, epoch):                         # what an epoch trains on: (latent, text)
    return [(cache[step], ref.complete) for step, ref in enumerate(loader(epoch))]

# %%
whose = {id(latent): ref for latent, ref in zip(cache, loader(0))}
epochs = range(1, 26)

def owners(epoch):                               # whose latent, whose text
    return [(whose[id(latent)], ref) for (latent, _), ref in zip(pairs(cache, epoch), loader(epoch))]

wrong = sum(a.id != b.id for epoch in epochs for a, b in owners(epoch))
print(f"{wrong} of {n * len(epochs)} latents meet the text of another picture: {wrong / n / len(epochs):.0%}")
epoch = next(e for e in epochs if any(a.id != b.id for a, b in owners(e)))
show([a.picture for a, _ in owners(epoch)], [f"text of {b.id},\npicture {a.id}" for a, b in owners(epoch)],
     columns=n, side=1.5)
assert 0.6 * (1 - 1 / n) < wrong / n / len(epochs) < 1.3 * (1 - 1 / n)

# %% [markdown]
# The cache was filled in the order of epoch 0 and is read by the number of the *step*, in the order of
# another epoch. In $n$ shuffled pictures, one in $n$ meets its own text by chance. This is a real bug: it was
# found in the SD3 DreamBooth trainer of diffusers (#14430). While all pictures have one and the same text it
# does no harm, and so nobody sees it. With texts of their own, the model learns that words do not mean what
# they say.
#
# ### Exercise 10.3 ★★ · A cache that cannot be paired wrongly
#
# Keep the shuffling (it is `loader`'s and is right), and encode each picture once. `ref.id` is a reference's
# name.

# %% tags=["exercise"]
def make_cache():
    # -> whatever `pairs` needs. encode(pipe.codec, ref.pictures[:1])[0] is the latent of one reference
    # BEGIN SOLUTION 10.3
    return {ref.id: encode(pipe.codec, ref.pictures[:1])[0] for ref in loader(0)}
    # END SOLUTION

def pairs(cache, epoch):
    # -> (latent, complete text) of every reference, in the order of loader(epoch)
    # BEGIN SOLUTION 10.3
    return [(cache[ref.id], ref.complete) for ref in loader(epoch)]
    # END SOLUTION

# %% tags=["wrong"]
def make_cache():                                # sorted, so that it has "a fixed order"
    return [encode(pipe.codec, ref.pictures[:1])[0] for ref in concept.references]

def pairs(cache, epoch):
    return [(latent, ref.complete) for latent, ref in zip(cache, loader(epoch))]

# %% tags=["wrong"]
def make_cache():                                # no shuffling any more
    return [encode(pipe.codec, ref.pictures[:1])[0] for ref in loader(0)]

def pairs(cache, epoch):
    return [(latent, ref.complete) for latent, ref in zip(cache, loader(0))]

# %% [markdown]
# <details><summary>Hint</summary>
#
# A position says where something stood once. A name says what it is. What is a dictionary's key?
# </details>

# %% tags=["check"]
calls = []
hook = pipe.codec.encoder.register_forward_hook(lambda *_: calls.append(1))
try:
    with torch.no_grad():
        cache = make_cache()
        shuffled = [pairs(cache, epoch) for epoch in epochs]
finally:
    hook.remove()
expect(len(calls) == n, f"the encoder was called {len(calls)} times for {n} pictures; each needs it once.")
truth = {ref.id: latent for ref, latent in zip(concept.references, pipe.encode_images(pictures))}
for epoch, made in zip(epochs, shuffled):
    latents = torch.stack([latent for latent, _ in made])
    own = torch.stack([truth[ref.id] for ref in loader(epoch)])
    expect(epoch > 1 or not torch.allclose(latents, torch.stack([truth[r.id] for r in loader(0)]), atol=1e-3),
           "the order is that of epoch 0 in every epoch: keep the shuffling of loader(epoch).")
    expect([text for _, text in made] == [ref.complete for ref in loader(epoch)],
           "the texts are those of loader(epoch), in its order.")
    expect(torch.allclose(latents, own, atol=1e-3),
           f"epoch {epoch}: a latent stands beside another picture's text. Ask by ref.id, not by position.")
    expect_close(latents, own, f"epoch {epoch}: the latents, each beside its own text,", tolerance=1e-3)
print(f"10.3 right: {len(epochs)} epochs, {n * len(epochs)} pairs, each picture with its own text")

# %% [markdown]
# The package never has two orders to begin with. `EncodedConcept` holds latents and all four texts of a
# reference in row $i$, and `draw_batch` draws *one* list of rows for everything: `data.variants[rows, ...]`
# and `data.texts.rows(rows)`. Its fingerprint (`learning.py`) covers pictures, texts and their order, so a
# run that is resumed with other files is refused.

# %% [markdown] tags=["slide"]
# ## A bug that never raises an error
#
# ```
# cache = [latent(ref) for ref in loader(0)]
# for step, ref in enumerate(loader(epoch)):
#     train(cache[step], ref.complete)
# ```
#
# Found in a public SD3 trainer. Row i of everything must belong to reference i: store by name, not by
# position.

# %% [markdown]
# ## 5 · The timestep shift
#
# SD3.5 trains and samples with times that are moved toward noise:
#
# $$\text{shift}(t) = \frac{s\,t}{1 + (s - 1)\,t}, \qquad s = 3.$$
#
# Why should a large picture need other times than a small one? Take a picture whose side is $k$ times larger,
# and look at it from so far away that $k \times k$ pixels become their mean. The picture hardly changes by
# that, as neighbouring pixels are alike. The noise does: the mean of $k^2$ independent numbers of variance 1
# has the standard deviation $1/k$. So from far away
#
# $$x_t \;\to\; (1 - t)\,x_0 + \tfrac{t}{k}\,x_1,$$
#
# and the ratio of noise to picture is $\frac{t}{k(1-t)}$, no longer $\frac{t}{1-t}$. At the same $t$ a large
# picture is **less** destroyed. To destroy it as much as the small one at $t$, we need a time $t'$ with
#
# $$\frac{t'}{k\,(1 - t')} = \frac{t}{1 - t} \quad\Longrightarrow\quad t' = \frac{k\,t}{1 + (k - 1)\,t}.$$
#
# That is the formula, with $s = k$. In other words, the shift multiplies the odds $t / (1 - t)$ by $s$.
#
# ### Exercise 10.4 ★★ · Times, in training and in sampling
#
# Training draws $t$ as the sigmoid of a standard normal, then shifts. Sampling takes `steps` times, evenly
# spaced from 1 down to `last`, shifts them, and ends with a 0. (The published scheduler has `last` =
# 0.002994, so the last step of SD3.5 is very short.) Both must use the same shift.

# %% tags=["exercise"]
def shifted(t, s):
    # BEGIN SOLUTION 10.4
    return s * t / (1 + (s - 1) * t)
    # END SOLUTION

def training_times(normal, s):
    # normal [B], drawn from a standard normal -> t [B]
    # BEGIN SOLUTION 10.4
    return shifted(torch.sigmoid(normal), s)
    # END SOLUTION

def stops(steps, s, last):
    # -> [steps + 1]: from 1 down to 0
    # BEGIN SOLUTION 10.4
    return torch.cat([shifted(torch.linspace(1, last, steps), s), torch.zeros(1)])
    # END SOLUTION

# %% tags=["wrong"]
def shifted(t, s):                               # toward the data
    return t / (s - (s - 1) * t)

def training_times(normal, s):
    return shifted(torch.sigmoid(normal), s)

def stops(steps, s, last):
    return torch.cat([shifted(torch.linspace(1, last, steps), s), torch.zeros(1)])

# %% tags=["wrong"]
def shifted(t, s):
    return s * t / (1 + (s - 1) * t)

def training_times(normal, s):                   # shifts in sampling only
    return torch.sigmoid(normal)

def stops(steps, s, last):
    return torch.cat([shifted(torch.linspace(1, last, steps), s), torch.zeros(1)])

# %% [markdown]
# <details><summary>Hint</summary>
#
# `torch.linspace(1, last, steps)` has `steps` times and includes both ends. The 0 comes behind them,
# unshifted (the shift would leave it 0 in any case).
# </details>

# %% tags=["check"]
t, normal = torch.linspace(0, 1, 11), torch.randn(64, generator=seeded(1))
expect(shifted(torch.tensor([0.5]), 3.0).item() > 0.5, "a shift of 3 moves times to noise: 0.5 becomes 0.75.")
expect_close(shifted(t, SHIFT), flow.shift_times(t, SHIFT), "shifted(t, s)")
expect(not torch.allclose(training_times(normal, SHIFT), torch.sigmoid(normal), atol=1e-4),
       "training has to shift its times as sampling does.")
expect_close(training_times(normal, SHIFT), flow.sample_times(64, SHIFT, seeded(1)), "training_times")
for steps in (4, 28):
    expect_close(stops(steps, SHIFT, LAST_TIME), torch.tensor(flow.sampling_times(steps, SHIFT, LAST_TIME)),
                 f"stops({steps}, s, last)")
print("10.4 right: 4 steps stop at", " ".join(f"{t:.4f}" for t in stops(4, SHIFT, LAST_TIME).tolist()))

# %%
k, half = 3, torch.tensor([0.5])
small = torch.tensor(pictures[:1]).permute(0, 3, 1, 2) / 127.5 - 1
large = small.repeat_interleave(k, dim=2).repeat_interleave(k, dim=3)      # the same picture, k times larger
e_small, e_large = (torch.randn(x.shape, generator=seeded(2)) for x in (small, large))
t_large = shifted(half, k)
seen = {"small, t = 0.5": flow.path(small, e_small, half),
        "large, t = 0.5,\nfar away": F.avg_pool2d(flow.path(large, e_large, half), k),
        f"large, t = {t_large.item():.2f},\nfar away": F.avg_pool2d(flow.path(large, e_large, t_large), k)}
amount = [1 - half, 1 - half, 1 - t_large]                                  # of the picture, in each
ratio = [((x - a * small).std() / a).item() for x, a in zip(seen.values(), amount)]
show([to_pictures(x / a)[0] for x, a in zip(seen.values(), amount)], list(seen), columns=3, side=1.8)
print("noise, where the picture counts 1:", " ".join(f"{r:.2f}" for r in ratio))
assert abs(ratio[2] / ratio[0] - 1) < 0.05 and abs(k * ratio[1] / ratio[0] - 1) < 0.05

draws = torch.randn(40_000, generator=seeded(4))
figure, axes = plt.subplots(1, 2, figsize=(8.2, 2.4), layout="constrained")
for s, colour in ((1.0, GREY), (SHIFT, CORAL)):
    axes[0].hist(training_times(draws, s).numpy(), 60, density=True, histtype="step", color=colour,
                 label=f"shift {s:g}")
    axes[1].plot(stops(28, s, LAST_TIME), color=colour, marker=".", label=f"shift {s:g}")
axes[0].set(xlabel="t", title="times of training")
axes[1].set(xlabel="step", ylabel="t", title="where a sampler of 28 steps stops")
axes[0].legend()
plt.show()
late = [(training_times(draws, s) > 0.5).float().mean().item() for s in (1.0, SHIFT)]
print(f"training times above 0.5: {late[0]:.0%} without the shift, {late[1]:.0%} with it")
assert abs(late[0] - 0.5) < 0.02 and late[1] > 0.8
t, scale = torch.tensor([0.2, 0.5, 0.8]), pipe.codec.config.scale           # without the scale of 10.2:
odds = [u / (1 - u) for u in (t, shifted(t, scale))]                        # noise to picture
assert torch.allclose(scale * odds[0], odds[1])

# %% [markdown]
# All three are divided by the amount of $x_0$ in them. The first and the third are equally noisy, as derived;
# the second one is three times less so.
#
# The **scale** of Exercise 10.2 is a shift as well. If $x_0$ is too small by a factor 1.53, noise outweighs
# it by 1.53 times as much at every $t$: the odds are multiplied, as by $s = 1.53$. Without the scale one
# trains with other times than intended. And a shift in training only, or in sampling only (SimpleTuner
# #2649), means that the model learns times which the sampler rarely visits.

# %% [markdown] tags=["slide"]
# ## The timestep shift
#
# From far away, $k \times k$ pixels are one, and their noise is $k$ times smaller. To be destroyed as much, a
# large picture needs a later time:
#
# $$\frac{t'}{k(1 - t')} = \frac{t}{1 - t} \quad\Rightarrow\quad t' = \frac{k\,t}{1 + (k - 1)\,t}$$
#
# ![](last)

# %% [markdown]
# ## 6 · What fills the card
#
# Four things lie on the card while a step runs.
#
# | | what | bytes a number |
# |---|---|---|
# | weights | the frozen MMDiT and its positions in 16 bits; the VAE in fp32 | 2; 4 |
# | adapters | LoRA and $Y$: one set in stage 1, two in stage 2 ($\theta_1$ frozen, $\theta_2$) | 4 |
# | optimizer | gradient and AdamW's two moments, of the set that is **trained** | 3 x 4 |
# | activations | what autograd keeps of the forward pass; and the encoded texts, which stay on the card | 2; 4 |
#
# The first three can be counted on paper. For the fourth, PyTorch has a hook: it is called with every tensor
# that a forward pass keeps for its backward pass. We use it on one full-size block after the other, on the
# meta device. (Note what is *not* kept: the input of a frozen linear layer. It is needed for the gradient of
# that layer's weight only.)

# %%
def kept(run, ignored):
    # bytes that autograd keeps for the backward pass of run(), without those in `ignored`; and run()'s result
    old, found = [tensor.untyped_storage() for tensor in ignored], {}
    known = set(map(id, old))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in known:
            found[id(storage)] = storage         # every storage once
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for storage in found.values()), result

def full_size(px, batch, rank=4):
    # on the meta device: MMDiT in bf16, VAE, one set of adapters; and bytes kept and given, block by block
    rows = px // 16
    with torch.device("meta"):
        mmdit = MMDiT(replace(SD35_MEDIUM, max_grid=rows, base_grid=rows)).bfloat16().requires_grad_(False)
        codec, lora, D = VAE().requires_grad_(False), LoRA(mmdit, rank), SD35_MEDIUM.width
        Y = torch.zeros(SD35_MEDIUM.depth, D)
        x, c, vec = (torch.zeros(batch, *shape, D).bfloat16() for shape in ([rows**2], [TOKENS], []))
        x, c = x.requires_grad_(), c.requires_grad_()
    kept_of, given = [], []
    for l, block in enumerate(mmdit.blocks):
        given.append(x.nbytes + c.nbytes)
        with flash_attention(), lora.attached(l, block, None):      # None: at every token
            size, (x, c) = kept(lambda: block(x, c, vec), [*block.parameters(), *lora.parameters()])
        kept_of.append(size)
    return mmdit, codec, [*lora.parameters(), Y], kept_of, given

PX, BATCH = 512, 2                               # the size of `learn`, and the paper's batch
mmdit, codec, adapters, kept_of, given = full_size(PX, BATCH)
cached = 5 * REFERENCES * TOKENS * SD35_MEDIUM.context_width * 4            # four texts, the class text
print(f"block 0 gets {given[0] / 1e6:.0f} MB and keeps {kept_of[0] / 1e6:.0f} MB; block 20 keeps "
      f"{kept_of[20] / 1e6:.0f} MB; all {len(kept_of)} keep {sum(kept_of) / 1e9:.2f} GB")
print(f"one set of adapters: {sum(a.numel() for a in adapters):,d} numbers; "
      f"texts in the cache: {cached / 1e9:.2f} GB")

paper = TrainConfig(batch=BATCH)
counted = {(stage, checkpointing): dry_run(SD35_MEDIUM, paper, PX, stage, checkpointing=checkpointing,
                                           method=METHODS["paper"])
           for stage, checkpointing in ((1, False), (2, False), (2, True))}  # some seconds each
assert 15 * given[0] < sum(kept_of) and kept_of[0] > kept_of[20]            # 13 blocks attend twice

# %% [markdown]
# With **gradient checkpointing** a block keeps its input alone. In the backward pass it is computed a second
# time, and what it keeps then exists for one block at a time.
#
# ### Exercise 10.5 ★★ · Count a step

# %% tags=["exercise"]
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    # mmdit, codec: frozen modules (count parameters and buffers). adapters: the tensors of ONE set.
    # kept_of[l], given[l]: bytes that block l keeps, and that it gets; cached: bytes of the encoded texts
    # -> bytes: {"weights": ., "adapters": ., "optimizer": ., "activations": .}
    # BEGIN SOLUTION 10.5
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) + max(kept_of) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * one_set,
            "activations": activations + cached}
    # END SOLUTION

# %% tags=["wrong"]
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) + max(kept_of) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * (weights + one_set),
            "activations": activations + cached}

# %% tags=["wrong"]
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * one_set,
            "activations": activations + cached}

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tensor.nbytes` knows the bytes of a number: 2 in bf16, 4 in fp32. Only one set is trained, in both stages.
# </details>
# <details><summary>Hint 2</summary>
#
# With checkpointing there are the inputs of all blocks and, while one block is computed again, what that one
# keeps. At the worst moment that is the largest block.
# </details>

# %% tags=["check"]
for (stage, checkpointing), ours in counted.items():
    made = step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing)
    case = f"stage {stage}, checkpointing {'on' if checkpointing else 'off'}"
    expect(made["optimizer"] < ours.weights, "frozen weights have neither gradients nor moments.")
    expect(not checkpointing or made["activations"] > 0.8 * ours.activations,
           "one block at a time is computed again; what it then keeps has to be counted, too.")
    for name, tolerance in dict(weights=1e-6, adapters=1e-6, optimizer=1e-3, activations=0.05).items():
        yours, theirs = torch.tensor(made[name] / 1e9), torch.tensor(getattr(ours, name) / 1e9)
        expect_close(yours / theirs, torch.tensor(1.0), f"{case}: your {name} / the package's", tolerance / 2)
    share = made["activations"] / ours.activations
    print(f"10.5 right: {case}: your activations are {share:.1%} of the package's count")

# %%
parts = ("weights", "adapters", "optimizer", "activations")
plt.figure(figsize=(7, 2), layout="constrained")
for row, ((stage, checkpointing), ours) in enumerate(counted.items()):
    left = 0
    for name, colour in zip(parts, (BLUE, CORAL, GOLD, GREY)):
        plt.barh(row, getattr(ours, name) / 1e9, left=left, color=colour, label=name if row == 0 else None)
        left += getattr(ours, name) / 1e9
plt.yticks(range(3), [f"stage {s}, checkpointing {'on' if c else 'off'}" for s, c in counted])
plt.gca().invert_yaxis()
plt.xlabel(f"GB: SD3.5 Medium, {PX} px, batch {BATCH}, counted")
plt.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25))
plt.show()
trained = 16 * values(real["MMDiT"]) / 1e9
print(f"stage 2 needs {(counted[2, False].total - counted[1, False].total) / 1e6:.0f} MB more than stage 1")
print(f"training all weights in fp32 (weight, gradient, two moments): {trained:.0f} GB before any activation")
assert counted[2, False].total - counted[1, False].total < 0.03e9 and trained > 35
assert counted[2, True].activations < counted[2, False].activations / 5

# %% [markdown]
# Three things can be read off. Adapters and optimizer are invisible: that is what LoRA is for. Stage 2 has
# three more predictions in a step and hardly needs more memory (for the frozen adapters and two more texts),
# because those three run without a gradient and keep nothing: time, not memory, is what PureCC costs. And the
# activations are what grows with the picture and the batch, so they are where to save.
#
# All this is **counted**. 0.6 GB of every total of the package are an assumption for CUDA's context and the
# allocator. And it was **measured once**, on an H100, with random weights of these sizes in bf16, 512 px and
# batch 2. The peak memory of a step, in GB, beside the count without the 0.6:
#
# | | stage 1 | stage 2 | stage 1, checkpointing | stage 2, checkpointing |
# |---|---|---|---|---|
# | counted | 9.00 | 9.02 | 5.49 | 5.50 |
# | measured | 9.13 | 9.14 | 5.61 | 5.62 |
#
# So the count was 0.12 to 0.13 GB too low, of the 0.6 that are added for it. Stage 2 needed as good as no
# more memory than stage 1, as counted, and more time: 0.36 s a step in place of 0.26. With a cap of 12 GB it
# ran as planned.
#
# The paper's Table 5 says 28 GB for a LoRA and 30 GB for PureCC, and not at which size; the released code
# keeps text encoders (11 GB) and a second transformer (5 GB) on the card, which explains most of the
# difference.

# %% [markdown] tags=["slide"]
# ## What fills the card
#
# ![](last)
#
# SD3.5 Medium, counted; on an H100 a step took 0.12 to 0.13 GB more. Adapters and optimizer are invisible.
# Activations are where to save.

# %% [markdown]
# ## 7 · Gradient checkpointing
#
# The saving of the last bar is one small class. It wraps a piece $f$ of the network:
#
# ```
# forward    (x, c) --f, nothing is kept--> outputs              keep x and c alone
# backward   (x, c) --f again, now kept---> outputs, <-- gradients of the outputs;   then forget
# ```
#
# Two facts about `torch.autograd.Function`: inside `forward` and `backward` no graph is built, unless you say
# `torch.enable_grad()`; and what `backward` returns are the gradients of `forward`'s arguments, `None` for
# those that need none. The adapters are *not* among the arguments: they hide inside $f$. (`one` is a number
# that needs a gradient. Without it the first block's output would seem to need none, because its inputs are
# data.)
#
# The cell below makes what the check needs: a branch on the tiny model, and a batch.

# %%
data = encode_set(pipe, concept)                 # the package's cache: rows of latents and texts
theta = Branch.fresh(pipe, torch.randn(tiny.depth, tiny.width, generator=seeded(5)), 4, seeded(6))
for B in theta.lora.B.values():                  # adapters that do something
    B.data.normal_(std=0.1, generator=seeded(7))
batch = draw_batch(data, TrainConfig(batch=2), 1, 0, SHIFT)
place = batch.texts.complete.slots > 0

# %% [markdown]
# ### Exercise 10.6 ★★★ · Compute it twice

# %% tags=["exercise"]
class Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, one, x, c, vec):
        # f(x, c, vec) -> (x, c); its c is None in the last block. Keep what backward needs in ctx.
        # BEGIN SOLUTION 10.6
        ctx.f = f
        ctx.save_for_backward(x, c, vec)
        return f(x, c, vec)
        # END SOLUTION

    @staticmethod
    def backward(ctx, grad_x, grad_c):
        # -> the gradients of f, one, x, c, vec: (None, None, ., ., None); adapters get theirs in .grad
        # BEGIN SOLUTION 10.6
        x, c, vec = (tensor.detach() for tensor in ctx.saved_tensors)
        x, c = x.requires_grad_(), c.requires_grad_()
        with torch.enable_grad():
            out = ctx.f(x, c, vec)
        both = [(o, g) for o, g in zip(out, (grad_x, grad_c)) if o is not None]
        torch.autograd.backward(*zip(*both))
        return None, None, x.grad, c.grad, None
        # END SOLUTION

def recompute(f, x, c, vec):
    return Recompute.apply(f, torch.ones((), requires_grad=True), x, c, vec)

# %% tags=["wrong"]
class Recompute(torch.autograd.Function):        # gradients of the arguments, and of nothing else
    @staticmethod
    def forward(ctx, f, one, x, c, vec):
        ctx.f = f
        ctx.save_for_backward(x, c, vec)
        return f(x, c, vec)

    @staticmethod
    def backward(ctx, grad_x, grad_c):
        x, c, vec = (tensor.detach() for tensor in ctx.saved_tensors)
        x, c = x.requires_grad_(), c.requires_grad_()
        with torch.enable_grad():
            out = ctx.f(x, c, vec)
        both = [(o, g) for o, g in zip(out, (grad_x, grad_c)) if o is not None]
        outs, grads = zip(*both)
        return None, None, *torch.autograd.grad(outs, (x, c), grads), None

def recompute(f, x, c, vec):
    return Recompute.apply(f, torch.ones((), requires_grad=True), x, c, vec)

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `forward`: put `f` in `ctx.f`, the three tensors in `ctx.save_for_backward(...)`, and return `f(x, c, vec)`.
# </details>
# <details><summary>Hint 2</summary>
#
# `backward`: take the saved tensors, cut them off from the old graph with `.detach()`, let `x` and `c` need a
# gradient, and run `ctx.f` again under `torch.enable_grad()`.
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.autograd.backward(outputs, gradients)` fills `.grad` of `x`, of `c`, *and* of all parameters on the
# way. `torch.autograd.grad` would give you the gradients you name, and leave the adapters without theirs.
# </details>

# %% tags=["check"]
def gradients(way):
    # bytes kept in the forward pass, and every adapter's gradient; way(f, x, c, vec) computes a block
    def visit(l, block, x, c, vec):
        def f(x, c, vec):
            with theta.lora.attached(l, block, None):            # None: at every token
                return block(x, theta.embeddings(l, c, place), vec)
        return way(f, x, c, vec)

    theta.zero_grad()
    size, v = kept(lambda: pipe.velocity(batch.x_t, batch.t, batch.texts.complete, visit),
                   [*pipe.mmdit.parameters(), *theta.parameters()])
    flow.squared_error(v, batch.v).backward()
    return size, {name: p.grad for name, p in theta.named_parameters()}

bytes_plain, ours = gradients(lambda f, *tensors: f(*tensors))
bytes_yours, yours = gradients(recompute)
expect(bytes_yours < bytes_plain / 4, f"your forward pass keeps {bytes_yours / 1e6:.1f} of "
                                      f"{bytes_plain / 1e6:.1f} MB: keep the inputs alone.")
for name, gradient in ours.items():
    if gradient is not None:
        expect(yours[name] is not None, f"{name} got no gradient: torch.autograd.backward fills them all.")
        expect_close(yours[name], gradient, f"the gradient of {name}", tolerance=1e-5)
print(f"10.6 right: the same gradients; kept {bytes_yours / 1e6:.1f} MB, not {bytes_plain / 1e6:.1f} MB")

# %%
plt.figure(figsize=(5, 1.4), layout="constrained")
plt.barh(["yours", "plain"], [bytes_yours / 1e6, bytes_plain / 1e6], color=[BLUE, GREY])
plt.xlabel("MB that the forward pass of the tiny model keeps")
plt.show()

# %% [markdown]
# The price is time: one more forward pass in every step. On the H100 of section 6 a step took 0.42 s in place
# of 0.26 in stage 1, and 0.53 s in place of 0.36 in stage 2. In `MMDiT.forward` it is a switch,
# `checkpointing`, and `learn` sets it only if the card is too small without. It calls PyTorch's own
# `torch.utils.checkpoint`, which does what yours does and needs no `one`. The results of both ways of
# training are the same, bit for bit (this is one of the package's tests).

# %% [markdown] tags=["slide"]
# ## Gradient checkpointing
#
# ![](last)
#
# Keep the inputs of a block, and compute it again in the backward pass. It costs one more forward pass.

# %% [markdown]
# ## 8 · Half precision, and gradients that vanish
#
# Frozen weights in 16 bits halve the largest part of the card. There are two formats:
#
# | | exponent | fraction | largest | smallest normal | smallest above 0 |
# |---|---|---|---|---|---|
# | fp32 | 8 bits | 23 bits | $3 \cdot 10^{38}$ | $10^{-38}$ | $10^{-45}$ |
# | bf16 | 8 bits | 7 bits | $3 \cdot 10^{38}$ | $10^{-38}$ | $10^{-40}$ |
# | fp16 | 5 bits | 10 bits | 65504 | $2^{-14} = 6 \cdot 10^{-5}$ | $2^{-24} = 6 \cdot 10^{-8}$ |
#
# bf16 has the range of fp32, and needs no care here. Cards before Ampere, such as the free T4, do not compute
# in it: there it is fp16, with a short range. What is so small in our step? The **gradient**. The loss is a
# mean over all $M$ latents of a batch, so
#
# $$\frac{\partial L}{\partial v_i} = \frac{2\,(v_i - \text{target}_i)}{M}, \qquad
# M = 2 \cdot 16 \cdot 64 \cdot 64 = 131\,072 \text{ at 512 px},$$
#
# about $10^{-5}$ for an error of 1, already below the smallest normal number. Every layer on the way back
# multiplies it further. Our tiny batch has 64 times fewer latents, so below its loss is divided by 64: at the
# output the gradients then have the size of 512 px. (How a *trained* network passes them on, a random one
# cannot tell.)

# %%
def gradient_sizes(scale):
    # |gradient| at the output of every block, in fp32, for a loss of the size that a 512 px picture has
    found = {}

    def visit(l, block, x, c, vec):
        with theta.lora.attached(l, block, None):
            x, c = block(x, theta.embeddings(l, c, place), vec)
        for stream, tokens in (("image", x), ("text", c)):
            if tokens is not None:
                tokens.register_hook(lambda g, key=(l, stream): found.update({key: g.abs().flatten()}))
        return x, c

    v = pipe.velocity(batch.x_t, batch.t, batch.texts.complete, visit)
    (scale * flow.squared_error(v, batch.v) * batch.v.numel() / M).backward()
    return torch.cat(list(found.values()))

M = 2 * 16 * 64 * 64
assert M == 64 * batch.v.numel()

shares = {}
plt.figure(figsize=(6.6, 2.5), layout="constrained")
for scale, colour in ((1, CORAL), (SCALE, BLUE)):
    sizes = gradient_sizes(scale)
    sizes = sizes[sizes > 0]                     # padding, and what nobody reads, has none
    name = f"loss times {scale}"
    plt.hist(sizes.log2().numpy(), 80, range=(-40, 0), histtype="step", color=colour, label=name)
    lost, rough = (some.float().mean().item() for some in (sizes.half() == 0, sizes < 2**-14))
    shares[scale] = lost
    print(f"loss times {scale:4d}: {lost:6.1%} of the gradients become 0 in fp16, "
          f"{rough:6.1%} are below the smallest normal number")
plt.axvline(-25, color=INK, lw=1)
plt.axvline(-14, color=INK, lw=1, ls=":")
plt.text(-25.4, plt.ylim()[1] * 0.6, "rounded to 0", ha="right")
plt.xlabel("log2 of the gradients' size; left of the dotted line fp16 has fewer digits")
plt.legend(loc="upper left")
plt.show()
assert shares[1] > 0.05 > 0.01 > shares[SCALE]

# %% [markdown]
# The remedy is one line. Multiply the loss by a constant before the backward pass, and divide the adapters'
# gradients, which are fp32, by it afterwards. Every gradient on the way is larger by that factor. The
# constant is $2^{12}$: a power of 2 changes the exponent alone, so no digit is rounded by it; and a larger
# one would come nearer to 65504 at the other end.
#
# ### Exercise 10.7 ★★ · A step that survives fp16
#
# The order matters: gradients of the old step away, backward, divide, *then* clip to the norm 1, step.

# %% tags=["exercise"]
def half_step(loss, parameters, optimizer, scale):
    # one step of the optimizer; gradients are clipped with torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    # BEGIN SOLUTION 10.7
    optimizer.zero_grad()
    (scale * loss).backward()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    # END SOLUTION

# %% tags=["wrong"]
def half_step(loss, parameters, optimizer, scale):           # never scales
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()

# %% tags=["wrong"]
def half_step(loss, parameters, optimizer, scale):           # clips before it divides
    optimizer.zero_grad()
    (scale * loss).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale
    optimizer.step()

# %% [markdown]
# <details><summary>Hint</summary>
#
# A parameter that took no part in the step has `grad` None. `parameter.grad /= scale` works in place.
# </details>

# %% tags=["check"]
half_pipe = load_sd3(DIR, size=size, dtype=torch.float16)
one = TrainConfig(steps=1, batch=2)

def fresh(pipe):                                 # the same adapters on a pipe of any precision
    theta = Branch.fresh(pipe, torch.zeros(tiny.depth, tiny.width), 4, seeded(6))
    for B in theta.lora.B.values():
        B.data.normal_(std=0.1, generator=seeded(7))
    return theta

def after(pipe, smaller, scale):                 # every gradient, and every parameter, after your step
    theta = fresh(pipe)
    loss = l_cc(Thetas(pipe.velocity, None, theta), draw_batch(data, one, 1, 0, SHIFT), 1.0)[0]
    half_step(smaller * loss, list(theta.parameters()), optimizer_for(theta, one), scale)
    named = {name: p for name, p in theta.named_parameters() if p.grad is not None}
    return {name: p.grad for name, p in named.items()}, {name: p.detach() for name, p in named.items()}

mine, theta_ours = after(half_pipe, 1.0, SCALE), fresh(half_pipe)
optimizer = optimizer_for(theta_ours, one)
next(train_steps(l_cc, Thetas(half_pipe.velocity, None, theta_ours), data, one, 1, optimizer))
for name, parameter in theta_ours.named_parameters():
    if parameter.grad is not None and parameter.grad.any():
        expect(mine[0][name].norm() < 10 * parameter.grad.norm(), f"{name}: too large a gradient: divide.")
        expect(mine[0][name].norm() > 0.1 * parameter.grad.norm(),
               f"{name}: the gradient is far too small: divide before you clip, or everything is clipped.")
far = 2.0**-12                                   # a loss so small that fp16 alone loses it
exact, in_half = (torch.cat([g.flatten() for g in after(some, far, SCALE)[0].values()])
                  for some in (pipe, half_pipe))
error = ((in_half - exact).norm() / exact.norm()).item()
expect(error < 0.03, f"for a small loss your fp16 gradient is {error:.0%} away from fp32's: scale the loss.")
for name, parameter in theta_ours.named_parameters():
    if parameter.grad is not None:
        expect_close(mine[0][name], parameter.grad, f"the gradient of {name}", tolerance=1e-6)
        expect_close(mine[1][name], parameter.detach(), f"{name} after the step", tolerance=1e-6)
without = torch.cat([g.flatten() for g in after(half_pipe, far, 1.0)[0].values()])
print(f"10.7 right: fp16 gradient of a small loss, away from fp32's: {error:.1%} scaled, "
      f"{((without - exact).norm() / exact.norm()).item():.0%} unscaled")

# %% [markdown]
# For the last line the loss was multiplied by $2^{-12}$: so small, fp16 alone loses the gradient altogether.
# In `train.py` the constant is called `SCALE`, and is always on: bf16 and fp32 have room for it.

# %% [markdown] tags=["slide"]
# ## Gradients that vanish in fp16
#
# The loss is a mean over 131,072 latents: gradients are about $10^{-5}$ at the output and smaller below. fp16
# ends at $6 \cdot 10^{-8}$. Multiply the loss by $2^{12}$, divide afterwards, then clip.
#
# ![](last)

# %% [markdown]
# ## 9 · End to end
#
# Now everything that you wrote runs together: `join` reads the texts, `make_cache` and `pairs` hold the
# latents (`encode` is in them), `training_times` draws, `half_step` trains, `stops` samples, `decode` shows.
# The two losses are those of lessons 4 and 6. There are two stages of 25 steps; the learning rate is a
# hundred times the paper's 1e-4, so that in 25 steps something moves in a random model. Pictures are drawn at
# guidance 5, which is Stability's own choice for Medium, over 50 steps; the paper does not say what it took.
#
# ```
# photographs --encode--> cache --.                         stage 1: L_CC --> theta_1, frozen --.
#                                  >-- pairs, times, noise --> batch --<                          > theta_2 --> file
# texts ---------join---> rows ---'                         stage 2: L --------------------------'
# ```

# %%
def read(texts):                                 # your join, at work
    ids, slots, phrases = pipe.tokenizer(texts, {"[V]": word})
    ids_l, ids_g, ids_t5 = ids.split([77, 77, 256], dim=1)
    (context_l, pooled_l), (context_g, pooled_g) = pipe.encoder.clip_l(ids_l), pipe.encoder.clip_g(ids_g)
    return Text(*join(context_l, context_g, pipe.encoder.t5(ids_t5), pooled_l, pooled_g), slots, phrases)

refs, settings = concept.references, TrainConfig(25, 2, learning_rate=1e-2, embedding_learning_rate=1e-2)
row_of = {ref.id: i for i, ref in enumerate(refs)}
with torch.no_grad():
    cache = make_cache()
    texts = Texts(*(read(some) for some in ([r.complete for r in refs], [r.base for r in refs],
                                            [r.target for r in refs], [""] * n)))

def your_batch(k):                               # step k's
    x_0 = torch.stack([latent for latent, _ in pairs(cache, k)[:2]])
    rows = torch.tensor([row_of[ref.id] for ref in loader(k)[:2]])
    t = training_times(torch.randn(2, generator=seeded(k)), SHIFT)
    return noised(x_0, torch.randn(x_0.shape, generator=seeded(1000 + k)), t, texts.rows(rows))

def train(theta, theta_1, loss_of_step, first):
    optimizer, losses = optimizer_for(theta, settings), []
    for k in range(first, first + settings.steps):
        loss, _ = loss_of_step(Thetas(pipe.velocity, theta_1, theta), your_batch(k), settings.eta)
        half_step(loss, list(theta.parameters()), optimizer, SCALE)
        losses.append(loss.item())
    return losses

@torch.no_grad()
def held(theta):                                 # L_CC on draws that no step sees
    thetas = Thetas(pipe.velocity, None, theta)
    return sum(l_cc(thetas, your_batch(5000 + k), 1)[0].item() for k in range(8)) / 8

untouched = tensor_hash(pipe.mmdit.state_dict())
theta_1 = Branch.fresh(pipe, class_word_states(pipe, data, seeded(0)), settings.rank, seeded(1))
before = held(theta_1)
stage_1 = train(theta_1, None, l_cc, 0)
theta_1.requires_grad_(False)                    # the extractor is frozen
theta_2 = Branch.fresh(pipe, theta_1.embeddings.Y.detach(), settings.rank, seeded(2))
stage_2 = train(theta_2, theta_1, METHODS["paper"].loss, 100)
print(f"L_CC on draws that were never trained on: {before:.3f} at first, {held(theta_1):.3f} for theta_1, "
      f"{held(theta_2):.3f} for theta_2")
print("the base model is untouched:", tensor_hash(pipe.mmdit.state_dict()) == untouched)
assert held(theta_1) < 0.95 * before and held(theta_2) < 0.95 * before
assert tensor_hash(pipe.mmdit.state_dict()) == untouched

# %%
@torch.no_grad()
def sample(theta, text, seeds, steps=6, guidance=5.0):
    times, null = stops(steps, SHIFT, LAST_TIME), read([""] * len(seeds))
    x = flow.noise_for(seeds, tuple(pairs(cache, 0)[0][0].shape))           # of the shape of a latent
    for t, t_next in zip(times, times[1:]):
        at = t.expand(len(x))
        x = x + (t_next - t) * flow.guide(theta(x, at, null), theta(x, at, text), guidance)
    return x

seeds = [1, 2, 3]
new_text = read([f"a small [V] {word} on the left in the snow"] * 3)
mine = sample(theta_2, new_text, seeds)
theirs = pipe.sample(new_text, seeds, steps=6, guidance=5.0, theta=theta_2)
apart = ((mine - theirs).norm() / theirs.norm()).item()
print(f"your sampler and the package's: {apart:.0e} apart, relative")
with torch.no_grad():
    drawn = to_pictures(decode(pipe.codec, mine).clamp(-1, 1))
figure, axes = plt.subplots(1, 5, figsize=(9.6, 2.1), layout="constrained", width_ratios=[1.5, 1.5, 1, 1, 1])
for axis, losses, name in zip(axes, (stage_1, stage_2), ("stage 1: $L_{CC}$", "stage 2: $L$")):
    axis.plot(losses, color=BLUE)
    axis.set(xlabel="step", title=name)
for axis, picture, seed in zip(axes[2:], drawn, seeds):
    axis.imshow(picture)
    axis.set(xticks=[], yticks=[], title=f"seed {seed}")
plt.show()
assert apart < 1e-3

# %% [markdown]
# The three pictures are texture, as announced: a random model with a random decoder. What the cell *shows* is
# that every part fits every other one: a concept was trained over an untouched base, and your sampler draws
# what the package's draws, number by number. With the real weights in `DIR`, the same classes run. How well a
# concept is learned on them is not measured here.

# %% [markdown] tags=["slide"]
# ## End to end, on a random model
#
# ![](last)
#
# Layout, order, memory, formats: yes. Quality: no.

# %% [markdown]
# ## 10 · A file for other programs
#
# Our concept file holds adapters, $Y$ and facts. Other programs know LoRA files. diffusers reads this:
#
# ```
# transformer.transformer_blocks.0.attn.to_q.lora_A.weight      A [r, in]
# transformer.transformer_blocks.0.attn.to_q.lora_B.weight      B [out, r]
# ```
#
# Our names are `A.blocks/0/attention/image/to_q`, with `/` because a parameter's name may hold no dot. The
# rename table of Sec. 1 has the rest. A client adds $\frac{\alpha}{r} B A$ to the weight. We train $B A$
# itself, so the file has to say $\alpha = r$. diffusers takes $\alpha$ from the file's metadata and, if it is
# absent, takes $r$.
#
# ### Exercise 10.8 ★★ · Export

# %% tags=["exercise"]
def to_diffusers(adapters, names):
    # adapters: {"A.blocks/0/attention/image/to_q": [r, in], "B.blocks/...": [out, r], ...}
    # names: {"blocks.0.attention.image.to_q": "transformer_blocks.0.attn.to_q", ...}
    # -> {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": [r, in], ...}
    # BEGIN SOLUTION 10.8
    made = {}
    for name, tensor in adapters.items():
        letter, key = name.split(".")
        made[f"transformer.{names[key.replace('/', '.')]}.lora_{letter}.weight"] = tensor
    return made
    # END SOLUTION

# %% tags=["wrong"]
def to_diffusers(adapters, names):               # no prefix
    made = {}
    for name, tensor in adapters.items():
        letter, key = name.split(".")
        made[f"{names[key.replace('/', '.')]}.lora_{letter}.weight"] = tensor
    return made

# %% tags=["wrong"]
def to_diffusers(adapters, names):               # A and B exchanged: "A is the matrix on the left"
    made = {}
    for name, tensor in adapters.items():
        letter, key = name.split(".")
        other = {"A": "B", "B": "A"}[letter]
        made[f"transformer.{names[key.replace('/', '.')]}.lora_{other}.weight"] = tensor
    return made

# %% [markdown]
# <details><summary>Hint</summary>
#
# `letter, key = name.split(".")`, then `names[key.replace("/", ".")]`.
# </details>

# %% tags=["check"]
file, lora_file = (Path(work.name) / f"{stem}.safetensors" for stem in ("concept", "pytorch_lora_weights"))
theta_2.save(file, concept_facts(pipe, word, settings, "paper", "sd3.5-medium"))
export_lora(file, lora_file)
with safe_open(lora_file, framework="pt") as opened:
    ours = {name: opened.get_tensor(name) for name in opened.keys()}
    about = json.loads(opened.metadata()["lora_adapter_metadata"])
made = to_diffusers(theta_2.lora.state_dict(), table)
expect(all(name.startswith("transformer.") for name in made),
       'every name begins with "transformer."; without it a client finds nothing, and says nothing.')
expect(made.keys() == ours.keys(), f"these names differ: {sorted(made.keys() ^ ours.keys())[:2]}")
for name in ours:
    expect_close(made[name], ours[name], name)
print(f"10.8 right: {len(made)} tensors; metadata: r = {about['transformer.r']}, "
      f"alpha = {about['transformer.lora_alpha']}")

# %%
layer, r = "transformer_blocks.0.attn.to_q", settings.rank
A, B = (made[f"transformer.{layer}.lora_{letter}.weight"] for letter in "AB")
alphas = [1, 2, r, 2 * r]
strengths = [((alpha / r * B @ A).norm() / (B @ A).norm()).item() for alpha in alphas]
plt.figure(figsize=(4.4, 1.9), layout="constrained")
plt.bar([str(alpha) for alpha in alphas], strengths, color=[GREY, GREY, BLUE, GREY])
plt.gca().set(xlabel=f"alpha in the file, for rank {r}", ylabel="strength in the client")
plt.show()
print(f"full size: {len(adapters) - 1} tensors, {sum(a.numel() for a in adapters[:-1]):,d} numbers, "
      f"{4 * sum(a.numel() for a in adapters) / 1e6:.1f} MB with Y")
assert strengths[0] == 1 / r and strengths[2] == 1 and len(adapters) - 1 == 382

# %% [markdown]
# **What a LoRA file cannot carry** is $Y$: no client knows a vector that replaces a text token at the input
# of every block. A client that loads the LoRA alone, with the class word in the place of [V], draws with
# $\theta_2$'s adapters and without its $Y$. For diffusers this recipe adds it by hooks; you can paste it into
# a script (it needs `pip install diffusers transformers peft` and the real weights; it does not run in this
# notebook. The package's tests run it on a small random model, and the picture equals ours):
#
# ```python
# import torch
# from diffusers import StableDiffusion3Pipeline
# from purecc_min.commands.export import attach_concept
# from tinyflow.sd3.load import load_tokenizer
#
# DIR = "the folder of the weights"
# pipeline = StableDiffusion3Pipeline.from_pretrained(DIR, torch_dtype=torch.bfloat16).to("cuda")
# pipeline.load_lora_weights("lora")             # the folder of pytorch_lora_weights.safetensors
# tokens = load_tokenizer(DIR)(["", "a [V] dog on a surfboard"], {"[V]": "dog"})    # first the empty text
# with attach_concept(pipeline.transformer, "concept.safetensors", tokens):
#     picture = pipeline("a dog dog on a surfboard", negative_prompt="", guidance_scale=5.0,
#                        height=512, width=512).images[0]
# ```
#
# Why "dog dog"? The text encoders read the class word at [V]; the second dog is the class word itself.

# %% [markdown] tags=["slide"]
# ## A file for other programs
#
# `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`
#
# ![](last)
#
# A client adds $\frac{\alpha}{r} B A$. The file says alpha = r. It cannot carry $Y$.

# %% [markdown]
# ## 11 · Lab: a free card of 16 GB
#
# What does `learn` decide on such a card? `fit` asks the count: False says that the step fits as it is, True
# that it fits with gradient checkpointing. (`python -m purecc_min memory` prints the whole table in about two
# minutes.)

# %%
GB, FREE = 1e9, 15e9                             # what a 16 GB card has left
print("stage 2 of the paper's method, counted, in GB, CUDA's context and slack (assumed 0.6) included")
totals = {}
for px in (512, 1024):
    for checkpointing in (False, True):
        need = dry_run(SD35_MEDIUM, paper, px, 2, checkpointing=checkpointing, method=METHODS["paper"])
        totals[px, checkpointing] = need.total
        switch, verdict = "on " if checkpointing else "off", "fits" if need.total <= FREE else "does not fit"
        print(f"  {px:4d} px, batch {BATCH}, checkpointing {switch} {need.total / GB:6.1f}   {verdict}")
for px in (512, 1024):
    print(f"learn --size {px} on {FREE / GB:.0f} GB: checkpointing "
          f"{'on' if fit(SD35_MEDIUM, paper, px, METHODS['paper'], int(FREE)) else 'off'}")
plt.figure(figsize=(5.6, 1.8), layout="constrained")
labels = [f"{px} px, {'on' if on else 'off'}" for px, on in totals]
colours = [BLUE if total <= FREE else CORAL for total in totals.values()]
plt.barh(labels, [total / GB for total in totals.values()], color=colours)
plt.axvline(FREE / GB, color=INK, lw=1)
plt.gca().invert_yaxis()
plt.xlabel("GB, counted; the line is a free card")
plt.show()
work.cleanup()                                   # the tiny model is deleted
assert abs(totals[512, False] / GB - 9.6) < 0.2 and totals[1024, False] > FREE > totals[1024, True]

# %% [markdown]
# Then, on a machine with the card (a notebook service with a T4 will do), with the weights in `DIR`:
#
# | | command | expect |
# |---|---|---|
# | 1 | `pip install -r requirements.txt tokenizers huggingface_hub` | |
# | 2 | the download of Sec. 1 | 16.3 GB on the disk; 7 without `text_encoder_3/*` and `tokenizer_3/*` |
# | 3 | `python -m purecc_min learn photos/ --base sd3.5-medium --weights DIR --class-word dog --out output/dog` | a line with the count, before anything is loaded: 9.6 GB in all at 512 px, batch 2, checkpointing off (counted) |
# | 4 | `python -m purecc_min sample output/dog/concept.safetensors --weights DIR "a [V] dog on a surfboard"` | a sheet and single pictures, in the place that the command prints |
# | 5 | `python -m purecc_min export output/dog/concept.safetensors --out lora/pytorch_lora_weights.safetensors` | 382 tensors |
#
# **Not measured**: a card of 16 GB such as the T4, and quality on the real weights. (What was measured, on an
# H100 with random weights, stands in sections 6 and 7.) In words: a T4 computes in fp16 (the package sees
# that by itself), is slow, and its host needs room to *map* T5's file; without T5 it is 7 GB in all. If step
# 3 names a smaller option, such as `--batch 1`, follow it. A run that is cut off goes on with the same
# command. `python -m tests.gpu --out card.md` measures kernels, memory and seconds on any CUDA card, beside
# the numbers that were counted (after `pip install -r tests/requirements.txt`).
#
# For photographs: three to five of one thing, from several sides, in *several* places, and a text beside each
# that names whatever is not the thing: `a [V] dog on a red sofa`. What no word explains becomes part of [V].

# %% [markdown] tags=["slide"]
# ## A free card of 16 GB
#
# ![](last)
#
# `python -m purecc_min learn photos/ --base sd3.5-medium --weights DIR --class-word dog`
#
# Counted; measured on an H100 only, not on a card of 16 GB. `learn` prints the count before it loads
# anything.

# %% [markdown]
# ## What you can now say
#
# * One text becomes 77 + 256 tokens and one vector. CLIP-L and CLIP-G stand side by side, T5 behind them, and
# [V] has a slot in both parts.
# * Latents are shifted and scaled, times are shifted, rows are paired. Each of these, forgotten, raises no
# error.
# * Beside the frozen weights, a card is filled by activations. Stage 2 needs hardly more memory than stage 1;
# checkpointing buys memory with time.
# * fp16 loses small gradients. A power of 2 before the backward pass, taken back before the clipping, keeps
# them.
# * A LoRA file carries the adapters under names that a client knows, with alpha = r, and not $Y$.
#
# | you wrote | in the package |
# |---|---|
# | `join` | `tinyflow/sd3/encoder.py`: `SD3Encoder.forward` |
# | `encode`, `decode` | `tinyflow/vae.py`: `VAE.encode`, `VAE.decode` |
# | `make_cache`, `pairs` | `purecc_min/concept.py`: `encode`, `EncodedConcept`; `purecc_min/train.py`: `draw_batch` |
# | `shifted`, `training_times`, `stops` | `tinyflow/flow.py`: `shift_times`, `sample_times`, `sampling_times` |
# | `step_memory` | `purecc_min/commands/memory.py`: `dry_run` |
# | `Recompute` | `torch.utils.checkpoint` in `MMDiT.forward` |
# | `half_step` | `purecc_min/train.py`: `update` |
# | `to_diffusers` | `purecc_min/commands/export.py`: `export_lora` |
#
# ## Three questions
#
# **1.** All your photographs have the same text. Does the cache of Sec. 4, with the bug, do any harm?
# <details><summary>Answer</summary>
#
# No: every latent meets a text that is equal to its own. That is why the bug lived so long. As soon as texts
# differ, which is what good texts do, it teaches the model that words and pictures have nothing to do with
# each other.
# </details>
#
# **2.** Someone forgets to divide the gradients by the scale. AdamW divides its step by the gradients' own
# size, so is the forgotten division harmless?
# <details><summary>Answer</summary>
#
# AdamW alone would hardly notice. But the clipping comes first: 4096 times as large, every gradient is above
# the norm 1, so every step is cut to the same length. Gradients of calm steps then count as much as those of
# wild ones.
# </details>
#
# **3.** Stage 2 predicts four velocities where stage 1 predicts one. Why does it not need four times the
# activations?
# <details><summary>Answer</summary>
#
# Three of the four (for the target, the empty and the base text) run under `no_grad`: nothing is kept of
# them, and the memory of one block is used again by the next. With the gradient through $v_{original}$ as
# well (lesson 6) two predictions would be kept, and the activations would be about twice as many.
# </details>
#
# **Next:** your own photographs. And the [benchmark](../../purecc_min/benchmark/README.md), if you want to
# know what a method of your own costs the model.
