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
# # 10 · Photographs on Stable Diffusion 3.5 (optional)
#
# **From a folder of photographs to a concept that other programs can load**
#
# The classes of this course also load the public weights of Stable Diffusion 3.5 Medium, the model that the
# paper customizes. What changes is everything *around* the method: three text encoders, an autoencoder,
# half precision, and a card whose memory has an end. You write these parts, and then all of them run
# together.
#
# **When you are through, you have written** the text stream of SD3.5, its latents, a cache in which no
# picture gets another one's text, a count of a step's memory, and a training step for fp16.
#
# **What runs here, and what that shows.** The real weights are 16.3 GB and need a card. Here a *tiny random
# model* runs end to end. It lies on the disk in the public layout, and the package loads it like the real
# one. So this lesson shows that formats, shapes, order, memory and arithmetic are right. It shows **nothing
# about quality**: a random model draws noise, whatever it has learned.
#
# | | |
# |---|---|
# | Needs | lessons 1 to 6; and `pip install tokenizers`, which reads T5's vocabulary |
# | Keep open | [`tinyflow/sd3/README.md`](../../tinyflow/sd3/README.md), **after** you have tried |
#
# Hints are folded; the solved notebook is in [`../solved`](../solved).

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
from purecc_min.commands.memory import OVERHEAD, REFERENCES, TOKENS, dry_run, fit, flash_attention
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
plt.xlabel("GB on the disk; the last three read the text")
plt.show()
assert values(real["MMDiT"]) == 2_243_171_520 and values(real["T5-XXL"]) == 4_762_310_656
assert 16 < sum(stored.values()) < 17 and stored["T5-XXL"] > sum(stored.values()) / 2
assert abs(stored["T5-XXL"] - 9.5) < 0.1

# %% [markdown]
# More than half of the download is T5, which only reads. You may leave it out; then its 256 tokens are
# zeros. That saves 9.5 GB; what it costs in pictures is not measured here. The weights are *gated*: accept
# the licence on the model's page, log in, and download ([commands](../../tinyflow/sd3/README.md)).
#
# The cell below writes a tiny random model to a folder under the **public names**. The table `mmdit_layers`
# says what diffusers calls each of our layers; `[swap]` says that its two halves are exchanged: we keep
# shift and scale, diffusers keeps scale and shift. Forgotten, this fits in every shape and ruins every
# picture.

# %% [markdown] tags=["slide"]
# ## Five networks, 16 GB
#
# ![The size on the disk of the five networks as bars; T5-XXL is the largest](last)
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
# `learn` reads your own photographs in the same way, with a text in a `.txt` file beside each. Seven random
# crops of every photograph are made, each mirrored with probability one half: so a model cannot learn one
# frame by heart.
#
# ## 2 · Three encoders read every text
#
# | | what it is | gives | tokens |
# |---|---|---|---|
# | CLIP-L | was trained to match pictures with texts | states of width 768, and one vector for the whole text | 77 |
# | CLIP-G | the same, larger | states of width 1280, and one vector | 77 |
# | T5-XXL | a language model, never saw a picture | states of width 4096 | 256 |
#
# ```
#               width 4096
#    77 tokens  [ CLIP-L 768 | CLIP-G 1280 | zeros 2048 ]        pooled = [ CLIP-L 768 | CLIP-G 1280 ]
#   256 tokens  [              T5 4096                  ]
# ```
#
# The two CLIPs read the *same* 77 tokens, so their states stand side by side. T5 cuts the text in another
# way, so its tokens come after them. *Pooled* speaks through adaLN (lesson 2).
#
# ### Exercise 10.1 ★ · One text stream from three

# %% [markdown] tags=["slide"]
# ## Three encoders read every text
#
# ![77 tokens of CLIP-L, CLIP-G and zeros, and 256 tokens of T5](../diagrams/encoders.svg)
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
# says: the same 77 tokens
def join(clip_l, clip_g, t5, pooled_l, pooled_g):            # one encoder after the other
    wide = [F.pad(x, (0, t5.shape[-1] - x.shape[-1])) for x in (clip_l, clip_g, t5)]
    return torch.cat(wide, dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

# %% tags=["wrong"]
# says: CLIP's 77 tokens come first
def join(clip_l, clip_g, t5, pooled_l, pooled_g):
    clip = torch.cat([clip_l, clip_g], dim=-1)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([t5, clip], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

# %% tags=["wrong"]
# says: the zeros stand behind
def join(clip_l, clip_g, t5, pooled_l, pooled_g):
    clip = torch.cat([clip_l, clip_g], dim=-1)
    clip = F.pad(clip, (t5.shape[-1] - clip.shape[-1], 0))
    return torch.cat([clip, t5], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)

# %% tags=["wrong"]
# says: pooled has CLIP-L's vector first
def join(clip_l, clip_g, t5, pooled_l, pooled_g):
    clip = torch.cat([clip_l, clip_g], dim=-1)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], dim=1), torch.cat([pooled_g, pooled_l], dim=-1)

# %% [markdown]
# <details><summary>Hint</summary>
#
# Side by side is `dim=-1`, one after the other is `dim=1`. `F.pad(x, (0, k))` puts $k$ zeros behind the
# last axis.
# </details>

# %% tags=["check"]
asked = [concept.references[0].complete, ""]
ids, slots, _ = pipe.tokenizer(asked, {"[V]": word})         # the encoders read the class word at [V]
ids_l, ids_g, ids_t5 = ids.split([77, 77, 256], dim=1)
(context_l, pooled_l), (context_g, pooled_g) = pipe.encoder.clip_l(ids_l), pipe.encoder.clip_g(ids_g)
states_t5 = pipe.encoder.t5(ids_t5)
made = join(context_l, context_g, states_t5, pooled_l, pooled_g)
theirs, both = pipe.encode_text(asked, {"[V]": word}), context_l.shape[-1] + context_g.shape[-1]
expect(isinstance(made, tuple) and len(made) == 2, "return two tensors, context and pooled.")
context, pooled = made
expect(context.shape[1] == 333, "CLIP-L and CLIP-G read the same 77 tokens: put their states side by side.")
expect(context.shape[2] == states_t5.shape[2], "the context is as wide as T5's states: zeros fill it up.")
expect(not torch.allclose(context[:, :256], states_t5), "CLIP's 77 tokens come first, then T5's 256.")
expect(context[:, :77, :both].any() and not context[:, :77, both:].any(), "the zeros stand behind CLIP-G.")
expect_close(context, theirs.context, "context (CLIP-L before CLIP-G)")
expect(not torch.allclose(pooled, torch.cat([pooled_g, pooled_l], -1)), "pooled has CLIP-L's vector first.")
expect_close(pooled, theirs.pooled, "pooled")
print(f"10.1 right: context {list(context.shape)}, pooled {list(pooled.shape)}")

# %%
tokens_l = pipe.tokenizer.clip_l.tokenizer.encode(asked[0].replace("[V]", word)).tokens
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
assert in_clip == in_t5 == asked[0].count("[V]") and not slots[1].any() and not context[0, :77, both:].any()

# %% [markdown]
# [V] has a slot in **both** parts, and $Y^l$ stands in both. If it stood in CLIP's only, T5's token would
# go on saying "any robot" beside it. The white corner below the CLIP tokens is the padding.
#
# ## 3 · Latents
#
# The flow of SD3.5 runs on the *latents* of an autoencoder. Pixels enter it as numbers in $[-1, 1]$. Its
# encoder gives the mean and log-variance of a normal distribution, and we take the mean. One step is left:
#
# $$x_0 = (\text{mean} - \text{shift}) \cdot \text{scale}, \qquad \text{mean} = x_0 / \text{scale} + \text{shift},
# \qquad \text{shift} = 0.0609, \; \text{scale} = 1.5305.$$
#
# Eq. 1 mixes $x_0$ with noise of mean 0 and variance 1, and the two numbers give latents about that mean
# and variance. Nothing fails without them: shapes fit, the loss falls. The first SD3 trainers of diffusers
# forgot the shift (#8708).
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
# says: too large by shift * scale
def encode(codec, pictures):                     # forgets the shift
    mean, _ = codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, dim=1)
    return mean * codec.config.scale

def decode(codec, x_0):
    return codec.decoder(x_0 / codec.config.scale)

# %% tags=["wrong"]
# says: pixels in [0, 1]
def encode(codec, pictures):
    mean, _ = codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 255).chunk(2, dim=1)
    return (mean - codec.config.shift) * codec.config.scale

def decode(codec, x_0):
    return codec.decoder(x_0 / codec.config.scale + codec.config.shift)

# %% tags=["wrong"]
# says: before you multiply
def encode(codec, pictures):                     # multiplies first
    mean, _ = codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, dim=1)
    return mean * codec.config.scale - codec.config.shift

def decode(codec, x_0):
    return codec.decoder((x_0 + codec.config.shift) / codec.config.scale)

# %% tags=["wrong"]
# says: log-variance
def encode(codec, pictures):                     # the wrong half of the channels
    _, mean = codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, dim=1)
    return (mean - codec.config.shift) * codec.config.scale

def decode(codec, x_0):
    return codec.decoder(x_0 / codec.config.scale + codec.config.shift)

# %% tags=["wrong"]
# says: the package's own answer
def encode(codec, pictures):                     # the package's own
    return codec.encode(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1)

def decode(codec, x_0):
    return codec.decode(x_0)

# %% [markdown]
# <details><summary>Hint</summary>
#
# `chunk(2, dim=1)` cuts the channels in half. The way back undoes the steps in the opposite order.
# </details>

# %% tags=["check"]
pictures = torch.tensor([r.picture.tolist() for r in concept.references], dtype=torch.uint8).numpy()
shift, scale = pipe.codec.config.shift, pipe.codec.config.scale
expect(not {"encode", "encode_images", "decode"} & {*encode.__code__.co_names, *decode.__code__.co_names},
       "this is the package's own answer: write it out yourself.")
with torch.no_grad():
    yours, ours = encode(pipe.codec, pictures), pipe.encode_images(pictures)
    expect(isinstance(yours, torch.Tensor) and yours.shape == ours.shape,
           f"encode should return a tensor of shape {list(ours.shape)}.")
    in_0_1 = pipe.codec.encode(torch.tensor(pictures).permute(0, 3, 1, 2) / 255)
    log_variance = pipe.codec.encoder(torch.tensor(pictures).permute(0, 3, 1, 2) / 127.5 - 1).chunk(2, 1)[1]
    for mistake, wrong in {
            "every latent is too large by shift * scale: the shift is forgotten": ours + shift * scale,
            "subtract the shift before you multiply": ours + shift * (scale - 1),
            "these are the latents of pixels in [0, 1]; the VAE was trained on pixels in [-1, 1]": in_0_1,
            "this is the log-variance; the mean is the first half of the channels":
                (log_variance - shift) * scale}.items():
        expect(not torch.allclose(yours, wrong, atol=1e-4), f"{mistake}.")
    expect_close(yours, ours, "encode(codec, pictures)", tolerance=1e-3)
    back, other_order = decode(pipe.codec, ours), pipe.codec.decoder((ours + shift) / scale)
    expect(not torch.allclose(back, other_order, atol=1e-5),
           "undo the steps in the opposite order: first divide by the scale, then add the shift.")
    expect_close(back, pipe.codec.decode(ours), "decode(codec, x_0)", tolerance=1e-3)
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
# The last picture is what a *random* decoder makes of it. The real VAE was trained to give the first one
# back.

# %% [markdown] tags=["slide"]
# ## Latents
#
# $$x_0 = (\text{mean} - 0.0609) \cdot 1.5305$$
#
# ![A picture, some channels of its latents, and what a wrong scale decodes to](last)
#
# Forgotten, nothing fails: shapes fit, and the loss falls.

# %% [markdown]
# ## 4 · A cache, and a bug that never raises an error
#
# The text encoders weigh 11 GB, and they say the same in every step. So we encode every text and picture
# **once**, before training. (The authors' released code encodes everything anew in each step.) A cache has
# one duty: **row $i$ of everything belongs to reference $i$.** Below is a cache as one writes it. It runs,
# and the loss falls. Read it before you look at what it does.

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
# another epoch. In $n$ shuffled pictures, one in $n$ meets its own text by chance. This is a real bug: it
# was found in the SD3 DreamBooth trainer of diffusers (#14430). While all pictures have one and the same
# text it does no harm, and so nobody sees it. With texts of their own, the model learns that words do not
# mean what they say.
#
# ### Exercise 10.3 ★★ · A cache that cannot be paired wrongly
#
# Keep the shuffling (it is `loader`'s and is right), and encode each picture once. `ref.id` is a
# reference's name.

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
# says: another picture's text
def make_cache():                                # sorted, so that it has "a fixed order"
    return [encode(pipe.codec, ref.pictures[:1])[0] for ref in concept.references]

def pairs(cache, epoch):
    return [(latent, ref.complete) for latent, ref in zip(cache, loader(epoch))]

# %% tags=["wrong"]
# says: keep the shuffling
def make_cache():                                # no shuffling any more
    return [encode(pipe.codec, ref.pictures[:1])[0] for ref in loader(0)]

def pairs(cache, epoch):
    return [(latent, ref.complete) for latent, ref in zip(cache, loader(0))]

# %% tags=["wrong"]
# says: each needs it once
def make_cache():                                # no cache at all
    return None

def pairs(cache, epoch):
    return [(encode(pipe.codec, ref.pictures[:1])[0], ref.complete) for ref in loader(epoch)]

# %% tags=["wrong"]
# says: the complete texts
def make_cache():
    return {ref.id: encode(pipe.codec, ref.pictures[:1])[0] for ref in loader(0)}

def pairs(cache, epoch):                         # without [V], nothing is learned under its name
    return [(cache[ref.id], ref.base) for ref in loader(epoch)]

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
           "the texts are the complete texts of loader(epoch), in its order.")
    expect(torch.allclose(latents, own, atol=1e-3),
           f"epoch {epoch}: a latent stands beside another picture's text. Ask by ref.id, not by position.")
    expect_close(latents, own, f"epoch {epoch}: the latents, each beside its own text,", tolerance=1e-3)
print(f"10.3 right: {len(epochs)} epochs, {n * len(epochs)} pairs, each picture with its own text")

# %% [markdown]
# The package never has two orders to begin with: `EncodedConcept` holds latents and texts of a reference in
# row $i$, and `draw_batch` draws *one* list of rows for both.

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
# SD3.5 shifts its times toward noise (lesson 1), with $s = 3$. Why does a large picture need other times
# than a small one? Take a picture whose side is $k$ times larger, and look from so far away that
# $k \times k$ pixels become their mean. The picture hardly changes, as neighbouring pixels are alike. The
# noise does: the mean of $k^2$ independent numbers has the standard deviation $1/k$. So at the same $t$ a
# large picture is **less** destroyed. To destroy it as much as the small one at $t$, we need a time $t'$
# with
#
# $$\frac{t'}{k\,(1 - t')} = \frac{t}{1 - t} \quad\Longrightarrow\quad t' = \frac{k\,t}{1 + (k - 1)\,t},$$
#
# which is the shift with $s = k$.

# %%
k, half = 3, torch.tensor([0.5])
small = torch.tensor(pictures[:1]).permute(0, 3, 1, 2) / 127.5 - 1
large = small.repeat_interleave(k, dim=2).repeat_interleave(k, dim=3)      # the same picture, k times larger
e_small, e_large = (torch.randn(x.shape, generator=seeded(2)) for x in (small, large))
t_large = flow.shift_times(half, k)
seen = {"small, t = 0.5": flow.path(small, e_small, half),
        "large, t = 0.5,\nfar away": F.avg_pool2d(flow.path(large, e_large, half), k),
        f"large, t = {t_large.item():.2f},\nfar away": F.avg_pool2d(flow.path(large, e_large, t_large), k)}
amount = [1 - half, 1 - half, 1 - t_large]                                  # of the picture, in each
ratio = [((x - a * small).std() / a).item() for x, a in zip(seen.values(), amount)]
show([to_pictures(x / a)[0] for x, a in zip(seen.values(), amount)], list(seen), columns=3, side=1.8)
print("noise, where the picture counts 1:", " ".join(f"{r:.2f}" for r in ratio))
assert abs(ratio[2] / ratio[0] - 1) < 0.05 and abs(k * ratio[1] / ratio[0] - 1) < 0.05

t, scale = torch.tensor([0.2, 0.5, 0.8]), pipe.codec.config.scale           # without the scale of 10.2:
odds = [u / (1 - u) for u in (t, flow.shift_times(t, scale))]               # noise to picture
assert torch.allclose(scale * odds[0], odds[1])

# %% [markdown]
# All are divided by the amount of $x_0$ in them. The first and the third are equally noisy; the second is
# three times less so. The **scale** of Exercise 10.2 is a shift as well: if $x_0$ is too small by a factor
# 1.53, the odds of noise to picture are 1.53 times as large at every $t$.

# %% [markdown] tags=["slide"]
# ## The timestep shift
#
# From far away, $k \times k$ pixels are one, and their noise is $k$ times smaller. To be destroyed as much,
# a large picture needs a later time:
#
# $$\frac{t'}{k(1 - t')} = \frac{t}{1 - t} \quad\Rightarrow\quad t' = \frac{k\,t}{1 + (k - 1)\,t}$$
#
# ![How often times are drawn with shift 1 and 3, and where a sampler of 28 steps stops](last)

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
# The first three can be counted on paper. For the fourth, PyTorch has a hook that sees every tensor which a
# forward pass keeps. We use it on full-size blocks, on the meta device.

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
# With **gradient checkpointing** a block keeps its input alone. In the backward pass it is computed a
# second time, and what it keeps then exists for one block at a time.
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
# says: neither gradients nor moments
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) + max(kept_of) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * (weights + one_set),
            "activations": activations + cached}

# %% tags=["wrong"]
# says: one block at a time is computed again
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * one_set,
            "activations": activations + cached}

# %% tags=["wrong"]
# says: 2 bytes a number
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(4 * tensor.numel() for tensor in some) for some in (frozen, adapters))
    activations = sum(given) + max(kept_of) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * one_set,
            "activations": activations + cached}

# %% tags=["wrong"]
# says: only one set is trained
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) + max(kept_of) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * stage * one_set,
            "activations": activations + cached}

# %% tags=["wrong"]
# says: encoded texts
def step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing):
    frozen = [*mmdit.parameters(), *mmdit.buffers(), *codec.parameters()]
    weights, one_set = (sum(tensor.nbytes for tensor in some) for some in (frozen, adapters))
    activations = sum(given) + max(kept_of) if checkpointing else sum(kept_of)
    return {"weights": weights, "adapters": stage * one_set, "optimizer": 3 * one_set,
            "activations": activations}

# %% [markdown]
# <details><summary>Hint 1</summary>
#
# `tensor.nbytes` knows the bytes of a number. Only one set is trained, in both stages.
# </details>
# <details><summary>Hint 2</summary>
#
# With checkpointing there are the inputs of all blocks and, at the worst moment, what the largest block
# keeps.
# </details>

# %% tags=["check"]
shares = []
for (stage, checkpointing), ours in counted.items():
    made = step_memory(mmdit, codec, adapters, stage, kept_of, given, cached, checkpointing)
    case = f"stage {stage}, checkpointing {'on' if checkpointing else 'off'}"
    expect(isinstance(made, dict) and set(made) == {"weights", "adapters", "optimizer", "activations"},
           "return a dictionary with weights, adapters, optimizer and activations.")
    expect(made["weights"] < 1.5 * ours.weights, "the MMDiT has 2 bytes a number: ask tensor.nbytes.")
    expect(made["optimizer"] < ours.weights, "frozen weights have neither gradients nor moments.")
    expect(made["optimizer"] < 1.5 * ours.optimizer, "only one set is trained; theta_1 is frozen in stage 2.")
    short = ours.activations - made["activations"]
    expect(checkpointing or abs(short) < abs(short - cached), "the encoded texts lie on the card, too.")
    expect(not checkpointing or short < 0.5 * max(kept_of),
           "one block at a time is computed again; what it then keeps has to be counted, too.")
    for name, tolerance in dict(weights=1e-6, adapters=1e-6, optimizer=1e-3, activations=0.05).items():
        yours, theirs = torch.tensor(made[name] / 1e9), torch.tensor(getattr(ours, name) / 1e9)
        expect_close(yours / theirs, torch.tensor(1.0), f"{case}: your {name} / the package's", tolerance / 2)
    shares.append(f"{made['activations'] / ours.activations:.1%}")
print("10.5 right: your activations are", ", ".join(shares), "of the package's count")

# %%
parts = ("weights", "adapters", "optimizer", "activations")
plt.figure(figsize=(7, 2), layout="constrained")
for row, ((stage, checkpointing), ours) in enumerate(counted.items()):
    left = 0
    for name, colour, hatch in zip(parts, (BLUE, CORAL, INK, GREY), ("", "//", "", "..")):
        plt.barh(row, getattr(ours, name) / 1e9, left=left, color=colour, hatch=hatch, edgecolor="white",
                 label=name if row == 0 else None)
        left += getattr(ours, name) / 1e9
plt.yticks(range(3), [f"stage {s}, checkpointing {'on' if c else 'off'}" for s, c in counted])
plt.gca().invert_yaxis()
plt.xlabel(f"GB: SD3.5 Medium, {PX} px, batch {BATCH}, counted")
plt.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.25))
plt.show()
trained = 16 * values(real["MMDiT"]) / 1e9
print(f"stage 2 needs {(counted[2, False].total - counted[1, False].total) / 1e6:.0f} MB more than stage 1")
print(f"training all weights in fp32 (weight, gradient, two moments): {trained:.0f} GB before any activation")
print("\na step, in GB                       counted   measured on an H100")
MEASURED = {(1, False): 9.13, (2, False): 9.14, (2, True): 5.62}            # with random weights, bf16
for (stage, checkpointing), ours in counted.items():
    step = sum(getattr(ours, name) for name in parts) / 1e9
    print(f"  stage {stage}, checkpointing {'on ' if checkpointing else 'off':18s}{step:.2f}      "
          f"{MEASURED[stage, checkpointing]:.2f}")
    assert 0.1 < MEASURED[stage, checkpointing] - step < 0.15
whole = counted[2, True]
print(f"before a step, encoding the texts:  {(whole.weights + whole.texts) / 1e9:.2f}")
print(f"learn asks for the larger one and {OVERHEAD / 1e9:.1f}: {whole.total / 1e9:.1f} with checkpointing, "
      f"{counted[2, False].total / 1e9:.1f} without")
assert counted[2, False].total - counted[1, False].total < 0.03e9 and trained > 35
assert counted[2, True].activations < counted[2, False].activations / 5
assert all(m.adapters + m.optimizer < 0.01 * m.total for m in counted.values())
assert whole.total == whole.weights + whole.texts + OVERHEAD > sum(getattr(whole, name) for name in parts)
assert abs(counted[2, False].total - OVERHEAD - 9.02e9) < 0.02e9 and abs(whole.total - 6.7e9) < 0.1e9

# %% [markdown]
# Adapters and optimizer are invisible: that is what LoRA is for. Stage 2 has three more predictions in a
# step and hardly needs more memory, because those three run without a gradient and keep nothing.
# Activations are where to save.
#
# The count was too low by 0.12 to 0.13 GB, of the 0.6 GB that are added to it for CUDA's context and the
# allocator. With checkpointing the step is no longer the largest thing: encoding the texts, before
# training, is.

# %% [markdown] tags=["slide"]
# ## What fills the card
#
# ![The memory of a step as bars: weights, activations, adapters and optimizer](last)
#
# SD3.5 Medium, counted; on an H100 a step took 0.12 to 0.13 GB more. Adapters and optimizer are invisible.
# Activations are where to save: with checkpointing a block keeps its input alone, and is computed twice.

# %% [markdown]
# ## 7 · What checkpointing costs
#
# One more forward pass in every step: on the H100 a step took 0.42 s in place of 0.26 in stage 1, and 0.53
# s in place of 0.36 in stage 2. So `learn` switches it on only where it must. It is PyTorch's own
# `torch.utils.checkpoint` in `MMDiT.forward`.
#
# ## 8 · Half precision, and gradients that vanish
#
# Frozen weights in 16 bits halve the largest part of the card. There are two formats:
#
# | | largest | smallest normal | smallest above 0 |
# |---|---|---|---|
# | bf16 | $3 \cdot 10^{38}$ | $10^{-38}$ | $10^{-40}$ |
# | fp16 | 65504 | $2^{-14}$ | $2^{-24}$ |
#
# bf16 has the range of fp32. Cards before Ampere, such as the free T4, do not compute in it: there it is
# fp16. What is so small in our step? The **gradient**. The loss is a mean over all $M$ latents of a batch,
# so
#
# $$\frac{\partial L}{\partial v_i} = \frac{2\,(v_i - \text{target}_i)}{M}, \qquad
# M = 2 \cdot 16 \cdot 64 \cdot 64 = 131\,072 \text{ at 512 px},$$
#
# about $10^{-5}$ for an error of 1, already below $2^{-14}$. Every layer on the way back multiplies it
# further. Our tiny batch has 64 times fewer latents, so below its loss is divided by 64. (How a *trained*
# network passes gradients on, a random one cannot tell.)

# %%
data = encode_set(pipe, concept)                 # the package's cache: rows of latents and texts

def fresh(pipe):                                 # the same adapters on a pipe of any precision
    theta = Branch.fresh(pipe, torch.zeros(tiny.depth, tiny.width), 4, seeded(6))
    for B in theta.lora.B.values():              # adapters that do something
        B.data.normal_(std=0.1, generator=seeded(7))
    return theta

theta, batch = fresh(pipe), draw_batch(data, TrainConfig(batch=2), 1, 0, SHIFT)
place = batch.texts.complete.slots > 0

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

lost_at = {}
plt.figure(figsize=(6.6, 2.5), layout="constrained")
for scale, colour, line in ((1, CORAL, "--"), (SCALE, BLUE, "-")):
    sizes = gradient_sizes(scale)
    sizes = sizes[sizes > 0]                     # padding, and what nobody reads, has none
    name = f"loss times {scale:.0f}"
    plt.hist(sizes.log2().numpy(), 80, range=(-40, 0), histtype="step", color=colour, ls=line, label=name)
    lost, rough = (some.float().mean().item() for some in (sizes.half() == 0, sizes < 2**-14))
    lost_at[scale] = lost
    print(f"loss times {scale:4.0f}: {lost:6.1%} of the gradients become 0 in fp16, "
          f"{rough:6.1%} are below the smallest normal number")
plt.axvline(-25, color=INK, lw=1)
plt.axvline(-14, color=INK, lw=1, ls=":")
plt.text(-25.4, plt.ylim()[1] * 0.6, "rounded to 0", ha="right")
plt.xlabel("log2 of the gradients' size; left of the dotted line fp16 has fewer digits")
plt.legend(loc="upper left")
plt.show()
assert lost_at[1] > 0.05 > 0.01 > lost_at[SCALE]

# %% [markdown]
# The remedy: multiply the loss by a constant before the backward pass, and divide the adapters' gradients,
# which are fp32, by it afterwards. The constant is $2^{12}$: a power of 2 rounds no digit.
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
# says: scale the loss
def half_step(loss, parameters, optimizer, scale):           # never scales
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()

# %% tags=["wrong"]
# says: divide before you clip
def half_step(loss, parameters, optimizer, scale):
    optimizer.zero_grad()
    (scale * loss).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale
    optimizer.step()

# %% tags=["wrong"]
# says: too large a gradient
def half_step(loss, parameters, optimizer, scale):           # never divides
    optimizer.zero_grad()
    (scale * loss).backward()
    optimizer.step()

# %% tags=["wrong"]
# says: those of the old step
def half_step(loss, parameters, optimizer, scale):           # keeps the old gradients
    (scale * loss).backward()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()

# %% tags=["wrong"]
# says: optimizer takes no step
def half_step(loss, parameters, optimizer, scale):
    optimizer.zero_grad()
    (scale * loss).backward()
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= scale
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)

# %% [markdown]
# <details><summary>Hint</summary>
#
# A parameter that took no part in the step has `grad` None. `parameter.grad /= scale` works in place.
# </details>

# %% tags=["check"]
half_pipe = load_sd3(DIR, size=size, dtype=torch.float16)
one = TrainConfig(steps=1, batch=2)

def after(pipe, smaller, scale, old=0.0):        # every gradient, and every parameter, after your step
    theta = fresh(pipe)
    for parameter in theta.parameters():         # of an old step
        parameter.grad = torch.full_like(parameter, old)
    loss = l_cc(Thetas(pipe.velocity, None, theta), draw_batch(data, one, 1, 0, SHIFT), 1.0)[0]
    half_step(smaller * loss, list(theta.parameters()), optimizer_for(theta, one), scale)
    named = {name: p for name, p in theta.named_parameters() if p.grad is not None}
    return {name: p.grad for name, p in named.items()}, {name: p.detach() for name, p in named.items()}

mine, theta_ours, before = after(half_pipe, 1.0, SCALE), fresh(half_pipe), fresh(half_pipe).state_dict()
expect(any(not torch.equal(after_, before[name]) for name, after_ in mine[1].items()),
       "no parameter has changed: the optimizer takes no step.")
again = after(half_pipe, 1.0, SCALE, old=1.0)[0]
expect(all(torch.allclose(gradient, mine[0][name], atol=1e-6) for name, gradient in again.items()),
       "the gradients hold those of the old step, too: begin with optimizer.zero_grad().")
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
# For the last line the loss was multiplied by $2^{-12}$: so small, fp16 alone loses the gradient.

# %% [markdown] tags=["slide"]
# ## Gradients that vanish in fp16
#
# The loss is a mean over 131,072 latents: gradients are about $10^{-5}$ at the output and smaller below.
# fp16 ends at $6 \cdot 10^{-8}$. Multiply the loss by $2^{12}$, divide afterwards, then clip.
#
# ![Histograms of the gradients' sizes with the loss times 1 and times 4096; left of a line they are rounded
# to 0](last)

# %% [markdown]
# ## 9 · End to end
#
# Everything that you wrote runs together: `join` reads the texts, `make_cache` and `pairs` hold the
# latents, `half_step` trains, `decode` shows. There are two stages of 25 steps; the learning rate is a
# hundred times the paper's 1e-4, so that in 25 steps something moves in a random model.

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
    t = flow.training_times(2, SHIFT, seeded(k))
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
    times, null = torch.tensor(flow.sampling_times(steps, SHIFT, LAST_TIME)), read([""] * len(seeds))
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
print(f"this sampler and the package's: {apart:.0e} apart, relative")
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
# The three pictures are texture, as announced: a random model with a random decoder. What the cell *shows*
# is that every part fits every other one: a concept was trained over an untouched base, and it is drawn as
# the package draws it. How well a concept is learned on the real weights is not measured here.

# %% [markdown] tags=["slide"]
# ## End to end, on a random model
#
# ![The losses of both stages, and three samples of the random model, which are patterns of noise](last)
#
# Layout, order, memory, formats: yes. Quality: no.

# %% [markdown]
# ## 10 · A file for other programs
#
# Other programs know LoRA files. `export` writes one, with diffusers' names for our layers. A client adds
# $\frac{\alpha}{r} B A$ to a weight. We train $B A$ itself, so the file has to say $\alpha = r$.

# %%
file, lora_file = (Path(work.name) / f"{stem}.safetensors" for stem in ("concept", "pytorch_lora_weights"))
theta_2.save(file, concept_facts(pipe, word, settings, "paper", "sd3.5-medium"))
export_lora(file, lora_file)
with safe_open(lora_file, framework="pt") as opened:
    written = {name: opened.get_tensor(name) for name in opened.keys()}
    about = json.loads(opened.metadata()["lora_adapter_metadata"])
for name in sorted(written)[:4]:
    print(f"{name:66s}{list(written[name].shape)}")
print(f"... {len(written)} tensors; rank {about['transformer.r']}, alpha {about['transformer.lora_alpha']}")
print(f"full size: {len(adapters) - 1} tensors, {sum(a.numel() for a in adapters[:-1]):,d} numbers, "
      f"{4 * sum(a.numel() for a in adapters) / 1e6:.1f} MB with Y")
assert about["transformer.r"] == about["transformer.lora_alpha"] == settings.rank and len(adapters) - 1 == 382
assert len(written) == len(theta_2.lora.state_dict()) and not any("embeddings" in name for name in written)

# %% [markdown]
# **What a LoRA file cannot carry** is $Y$: no client knows a vector that replaces a text token at the input
# of every block. A client that loads the LoRA alone, with the class word in the place of [V], draws with
# $\theta_2$'s adapters and without its $Y$. For diffusers, `attach_concept` adds it by hooks ([the lines to
# paste](../../tinyflow/sd3/README.md#other-programs); a test runs them on a small random model, and the
# picture equals ours).

# %% [markdown] tags=["slide"]
# ## A file for other programs
#
# `transformer.transformer_blocks.0.attn.to_q.lora_A.weight`
#
# A client adds $\frac{\alpha}{r} B A$. The file says alpha = r. It cannot carry $Y$.

# %% [markdown]
# ## 11 · Lab: a free card of 16 GB
#
# What does `learn` decide on such a card? `fit` asks the count: False says that it fits as it is, True that
# it fits with gradient checkpointing.

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
# Then, on a machine with the card, with the weights in `DIR`:
#
# ```
# python -m purecc_min learn photos/ --base sd3.5-medium --weights DIR --class-word dog --out output/dog
# python -m purecc_min sample output/dog/concept.safetensors --weights DIR "a [V] dog on a surfboard"
# ```
#
# The first command prints the count before it loads anything. **Not measured**: a card of 16 GB such as the
# T4, and quality on the real weights.
#
# For photographs: three to five of one thing, from several sides, in *several* places, and a text beside
# each that names whatever is not the thing: `a [V] dog on a red sofa`. What no word explains becomes part
# of [V].

# %% [markdown] tags=["slide"]
# ## A free card of 16 GB
#
# ![The memory of a step for two picture sizes, with and without checkpointing, and the line of a free
# card](last)
#
# `python -m purecc_min learn photos/ --base sd3.5-medium --weights DIR --class-word dog`
#
# Counted; measured on an H100 only, not on a card of 16 GB. `learn` prints the count before it loads
# anything.

# %% [markdown]
# ## What you can now say
#
# * [V] has a slot in CLIP's part of the text and in T5's.
# * Latents are shifted and scaled, rows are paired. Each of these, forgotten, raises no error.
# * Beside the frozen weights, a card is filled by activations. Checkpointing buys memory with time.
# * fp16 loses small gradients. A power of 2 before the backward pass, taken back before the clipping, keeps
# them.
# * A LoRA file carries the adapters with alpha = r, and not $Y$.
#
# ## Two questions
#
# **1.** All your photographs have the same text. Does the cache of Sec. 4, with the bug, do any harm?
# <details><summary>Answer</summary>
#
# No: every latent meets a text that is equal to its own. That is why the bug lived so long.
# </details>
#
# **2.** Someone forgets to divide the gradients by the scale. AdamW divides its step by the gradients' own
# size, so is the forgotten division harmless?
# <details><summary>Answer</summary>
#
# AdamW alone would hardly notice. But the clipping comes first: 4096 times as large, every gradient is
# above the norm 1, so gradients of calm steps count as much as those of wild ones.
# </details>
#
# **Next:** your own photographs. And the [benchmark](../../purecc_min/benchmark/README.md), if you want to
# know what a method of your own costs the model.
