"""The parts of the README that code writes: the picture and the tables, so that they stay true."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from course_lib import catalog, zoo
from course_lib.grading.items import items_of, set_names
from course_lib.grading.paths import CourseError, root, sources

PICTURE, GALLERY = "lectures/cover.png", "lectures/gallery.png"


def lectures() -> str:
    """A table of the lectures that exist, with their times and exercises."""
    rows = ["| lecture | about | minutes | exercises |", "|---|---|---|---|"]
    for number, path in sources("lectures").items():
        text = path.read_text()
        title = re.search(rf"^# # {number} (.+)$", text, re.M)
        about = re.search(r"^# \*\*(.+?)\.?\*\*", text, re.M)
        minutes = re.search(r"Time: (\d+) minutes", text)
        if not (title and about and minutes):
            raise CourseError(f"{path.name} must say '# {number} Title', a bold line about it, and 'Time: N minutes'")
        items = items_of(number).values() if number in set_names() else []
        work = (
            f"{len(items)} items, {sum(i.points for i in items)} points, {sum(i.minutes for i in items)} minutes" if items else ""
        )
        rows.append(f"| [{number} {title[1]}](lectures/{path.stem}.ipynb) | {about[1]} | {minutes[1]} | {work} |")
    return "\n".join(rows)


def models() -> str:
    """A table of the embedded models, from their cards."""
    rows = ["| model | parameters | size | trained in | on | measured |", "|---|---|---|---|---|---|"]
    for name in zoo.names():
        card = zoo.card(name)
        size = f"{card['parameters']:,} | {card['bytes'] / 1e6:.2f} MB"
        rows.append(f"| `{name}` | {size} | {card['seconds']} s | {card['hardware']} | {_measured(card['metrics'])} |")
    return "\n".join(rows)


def _measured(metrics: dict[str, Any]) -> str:
    """The numbers of a card in one line."""
    if "accuracy_held_out" in metrics:
        return f"{metrics['accuracy_held_out']:.1%} of held-out digits read"
    if "seen combinations" in metrics:
        held = metrics["held-out combinations"]
        azimuth = held["azimuth_mean_error_degrees"]
        return f"everything in a held-out picture read right {held['joint']:.1%}, azimuth {azimuth:.0f} degrees off"
    if "prompts" in metrics:
        right = ", ".join(f"{name} {row['obeyed']['all']:.1%}" for name, row in metrics["prompts"].items())
        return f"pictures that show all of their prompt: {right}; VAE {metrics['vae']['seen combinations']['psnr_db']:.1f} dB"
    if "without control" in metrics:
        kinds = {"given lines": "edge", "given near": "depth", "given classes": "seg"}
        given, error = next(pair for pair in kinds.items() if pair[0] in metrics)
        each = [metrics[key][error] for key in (f"{given} beside the prompt alone", "without control", "reconstructed renders")]
        names = {"edge": "1 - F1 of edges", "depth": "RMSE of nearness", "seg": "1 - mean IoU"}
        return f"{names[error]} {each[0]:.3f}, without control {each[1]:.3f}; renders read through the VAE {each[2]:.3f}"
    if "styled" in metrics.get("mini-style", {}):
        kept = metrics["mini-style"]
        return f"in the style {kept['styled']:.1%}; pictures that show their prompt {kept['obeyed']['all']:.1%}"
    if "seen combinations, as rendered, rendered" in metrics:
        held = metrics["held-out combinations, as rendered, rendered"]
        read = f"edges' F1 {1 - held['edge']:.2f}, RMSE of nearness {held['depth']:.3f}, mean IoU {1 - held['seg']:.2f}"
        return f"{read} on held-out renders"
    if "student" in metrics:
        calls = ", ".join(f"{calls}: {row['frechet']:.4f}" for calls, row in sorted(metrics["student"].items(), reverse=True))
        return f"Fréchet distance by network calls {calls}; real digits {metrics['frechet_floor']:.4f}"
    if "aware" in metrics:
        read = zip(metrics["sigmas"], metrics["aware"]["accuracy_held_out"], strict=True)
        return "held-out digits read at noise level " + ", ".join(f"{sigma:g}: {share:.0%}" for sigma, share in list(read)[2::2])
    if "loss_held_out_of_digits" in metrics:
        pairs = list(zip(*(metrics[key] for key in ("loss_sigmas", "loss_held_out", "loss_held_out_of_digits")), strict=True))
        sigma, weak, full = pairs[len(pairs) // 2]
        return f"loss at noise level {sigma:g} on held-out digits {weak:.3f}, of `digits` {full:.3f}"
    if "exact" in metrics:
        bend = [", ".join(f"{row[part]['straightness']:.4f}" for row in metrics["seeds"]) for part in ("first", "reflowed")]
        return f"three seeds: straightness {bend[0]}; after reflow {bend[1]}"
    if "seeds" in metrics:
        three = [", ".join(f"{row[key]:.2f}" for row in metrics["seeds"]) for key in ("precision", "recall")]
        return f"three seeds: precision {three[0]}; recall {three[1]}"
    if "joint" in metrics:
        names = {
            "pictures_of_attributes": "pictures of attributes",
            "attributes_of_pictures": "attributes of pictures",
            "joint": "both",
        }
        return "all five attributes agree: " + ", ".join(f"{words} {metrics[key]['all']:.0%}" for key, words in names.items())
    if "psnr_of_denoised" in metrics:
        denoised = ", ".join(f"{db:.1f} dB at noise level {sigma}" for sigma, db in metrics["psnr_of_denoised"].items())
        distance = f"Fréchet distance {metrics['frechet']:.3f}, real {metrics['frechet_of_real']:.3f}"
        return f"held-out pictures denoised to {denoised}; {distance}"
    if "never_trained" in metrics:
        gains = ", ".join(f"{row['size']} px: {row['gain'][0]:+.2f} dB" for row in metrics["sizes"])
        return f"beside bicubic enlargement of the decoded 64 px, {gains}"
    if "frechet_of_degraded" in metrics:
        middle = metrics["loss_sigmas"].index(1.0)
        names = [(split, f"loss_on_{split}_of_") for split in ("bad", "good")]
        pairs = [(split, metrics[f"{name}degraded"][middle], metrics[f"{name}mini_sd"][middle]) for split, name in names]
        loss = ", ".join(f"{split} pictures {a:.3f} and {b:.3f}" for split, a, b in pairs)
        far = f"Fréchet distance {metrics['frechet_of_degraded']:.2f} and {metrics['frechet_of_mini_sd']:.2f}"
        return f"its loss and that of `mini-sd` at noise level 1: {loss}; {far}"
    if "joint_error_mm" in metrics:
        mean = metrics["joint_error_of_the_mean_pose_mm"]
        return f"regressor {metrics['joint_error_mm']:.0f} mm from held-out joints, mean pose {mean:.0f} mm"
    if "psnr_of_denoised_and_of_prior" in metrics:
        both = metrics["psnr_of_denoised_and_of_prior"].items()
        gains = ", ".join(f"{told - alone:+.1f} dB at noise level {sigma}" for sigma, (told, alone) in both)
        return f"denoises held-out pictures, told y and the kernel, better than `scenes-prior` by {gains}"
    if "frame by frame" in metrics:
        ours, alone = metrics["seed 0"], metrics["frame by frame"]
        far = f"Fréchet video distance {ours['frechet']:.2f}, frame by frame {alone['frechet']:.1f}"
        return f"motion as asked in {ours['word']:.0%} of clips, shape and colour in {ours['identity']:.0%} of frames; {far}"
    if "video decoder" in metrics:
        ours, image = metrics["video decoder"], metrics["image decoder"]
        return f"flicker {ours['flicker']:.4f}, PSNR {ours['psnr']} dB; image decoder {image['flicker']:.4f}, {image['psnr']} dB"
    if "any scale" in metrics:
        ours, bilinear = metrics["with temporal layers, seed 0"], metrics["bilinear"]
        plain = f"bilinear enlargement {bilinear['detail']:.0%}, {bilinear['psnr']:.1f} dB"
        return f"{ours['detail']:.0%} of the detail of clips of 128 px, PSNR {ours['psnr']:.1f} dB; {plain}"
    if "shuffled" in metrics:
        read = ", ".join(f"{kind} {metrics[kind]['word']:.0%}" for kind in ("true", "reconstructed", "shuffled", "frozen"))
        return f"motion of held-out clips read as it was drawn: {read}"
    if "mini-style" in metrics:
        base, style = metrics["mini-sd"], metrics["mini-style"]
        if "direction" in base:
            return f"its motion and direction on `mini-sd` {base['direction']:.0%}, on `mini-style` {style['direction']:.0%}"
        return f"on `mini-style` the style kept in {style['style']:.0%} of frames, motion read in {style['moving']:.0%} of clips"
    quality, read = metrics["quality_at_guidance_1"], min(metrics["class_read_as_asked"].values())
    return f"class read as asked {read:.1%}, precision {quality['precision']:.2f}, recall {quality['recall']:.2f}"


def systems() -> str:
    """A table of the catalog."""
    rows = ["| lecture | method | paper | measured |", "|---|---|---|---|"]
    for s in catalog.systems():
        paper = f"[{s.authors} {s.year}](https://arxiv.org/abs/{s.arxiv})" if s.arxiv else f"{s.authors} {s.year}"
        rows.append(f"| {s.lecture} | {s.name} | {paper} | {s.measured} |")
    return "\n".join(rows)


PARTS = {"lectures": lectures, "models": models, "catalog": systems}


def render(text: str) -> str:
    """The README with its generated parts written anew; CourseError where a part has lost its markers."""
    for name, part in PARTS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(\n<!-- end {name} -->)", re.S)
        if not pattern.search(text):
            raise CourseError(f"README.md has no markers '<!-- begin {name} -->' and '<!-- end {name} -->'")
        text = pattern.sub(lambda match, part=part: match[1] + part() + match[2], text)
    return text


def write(base: Path | None = None) -> None:
    """Write the README's tables and its pictures."""
    from course_lib.study.cover import draw, gallery
    from course_lib.training import write_atomically

    base = base or root()
    fresh = render((base / "README.md").read_text())
    write_atomically(base / "README.md", lambda path: path.write_text(fresh))
    draw(base / PICTURE)
    gallery(base / GALLERY)
