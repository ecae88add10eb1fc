"""Templates of the demos' pages (string.Template): what they share, and the text and the viewer of the molecules."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from string import Template
from typing import Any

from fastnuggets.figures import table
from fastnuggets.molecules.files import atomic_write


def write_page(
    out: Path, name: str, template: str, fields: dict[str, Any], plan: Any, figures: dict[str, Any] | None = None
) -> Path:
    """NAME.html of a template that ends with its last section, its fields and, where these say nothing, the plan's; and
    NAME.json of the figures."""
    if figures is not None:
        with atomic_write(out / f"{name}.json") as file:
            file.write(json.dumps(figures, indent=1).encode())
    path = out / f"{name}.html"
    with atomic_write(path) as file:
        file.write((Template(template).substitute(plan._asdict() | fields) + END).encode())
    return path


def write_run(
    path: Path, title: str, lead: str, sections: Iterable[tuple[str, str]], tables: Mapping[str, Mapping[str, Any]]
) -> None:
    """A page of sections (title, HTML) and, at its end, tables of names and values."""
    parts = [f"<section><h2>{html.escape(name)}</h2>{body}</section>" for name, body in sections]
    for name, values in tables.items():
        rows = [(html.escape(str(key)), html.escape(str(value))) for key, value in values.items()]
        parts.append(f"<section class='text'><h2>{html.escape(name)}</h2>{table(['', ''], rows)}</section>")
    page = Template(HEAD).substitute(title=html.escape(title)) + f'<p class="lead">{html.escape(lead)}</p>'
    with atomic_write(path) as file:
        file.write((page + "\n".join(parts) + "\n" + END).encode())


END = "</main>\n</body>\n</html>\n"

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: #1b2330; --soft: #5d6878; --page: #f5f6f8; --card: #fff; --line: #e3e6ec;
  --accent: #2f6fed; --wash: #2f6fed22; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #98a3b5; --page: #11141a; --card: #191e27;
  --line: #2a313d; --accent: #7ba4ff; --wash: #7ba4ff2e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.6 system-ui, "Segoe UI", Roboto, Helvetica,
  Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 56px 24px 72px; }
h1 { font-size: clamp(30px, 5vw, 46px); line-height: 1.1; letter-spacing: -0.02em; margin: 0 0 14px; font-weight: 700; }
h2 { font-size: 23px; letter-spacing: -0.01em; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 78ch; }
.lead { font-size: 19px; color: var(--soft); margin-bottom: 28px; }
.note { color: var(--soft); font-size: 14px; margin: 12px 0 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 26px 28px 24px;
  margin: 22px 0 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px 20px 14px; }
.tile b { display: block; font-size: 31px; line-height: 1.2; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 14px; line-height: 1.35; display: block; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 20px 36px; }
img { width: 100%; height: auto; display: block; }
svg { width: 100%; height: auto; display: block; color: var(--ink); }
.rows { display: grid; grid-template-columns: 100px 1fr; align-items: stretch; }
.rows .side { display: grid; grid-template-rows: 1fr 1fr; }
.rows .side span, .heads span { color: var(--soft); font-size: 14px; line-height: 1.3; align-self: center; }
.heads { display: grid; grid-template-columns: repeat(4, 1fr); gap: 3%; text-align: center; margin: 14px 0 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 14px; color: var(--soft); }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; }
tbody th { text-align: left; font-weight: 500; }
th:first-child { text-align: left; padding-left: 0; }
tbody tr:last-child > * { border-bottom: 0; }
.bar { display: inline-block; min-width: 58px; padding: 0 5px; font-weight: 500; border-radius: 4px;
  background: linear-gradient(90deg, var(--wash) calc(100% * var(--v)), transparent 0); }
.text th, .text td { text-align: left; vertical-align: top; white-space: normal; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--accent); }
.pick { display: flex; flex-wrap: wrap; gap: 8px; margin: 14px 0; align-items: center; }
button { font: inherit; font-size: 14px; padding: 4px 13px; border-radius: 999px; border: 1px solid var(--line);
  background: none; color: var(--ink); cursor: pointer; }
button[aria-pressed=true] { background: var(--accent); border-color: var(--accent); color: var(--card); }
.gap { flex: 1; }
.views { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.view { position: relative; border: 1px solid var(--line); border-radius: 12px; overflow: hidden; background:
  radial-gradient(circle at 50% 45%, var(--card), var(--page)); }
.view canvas { width: 100%; aspect-ratio: 1.12; display: block; touch-action: none; cursor: grab; }
.view canvas:active { cursor: grabbing; }
.view span { position: absolute; left: 14px; top: 10px; font-size: 14px; color: var(--soft); pointer-events: none; }
.smiles { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; color: var(--soft); overflow-wrap: anywhere; }
@media (max-width: 640px) { .views { grid-template-columns: 1fr; }
  main { padding: 32px 14px; } section { padding: 18px; }
  .rows { grid-template-columns: 1fr; } .rows .side { display: none; } }
</style>
</head>
<body>
<main>
<h1>$title</h1>
"""

PAGE = (
    HEAD
    + """\
<p class="lead">Each atom is drawn into a grid as a wave that fades with the distance. A network squeezes the grids to a
few numbers and draws them again; from its drawing the atoms are found. The $tested molecules below were never
shown to it in training, but its settings were chosen on other runs over this set: a demonstration, no benchmark.</p>

<div class="tiles">
<div class="tile"><b>$recall</b><span>of the atoms come back, right element,
within $gate Å ($matched of $true)</span></div>
<div class="tile"><b>$precision</b><span>of the atoms found are right ($matched of $found)</span></div>
<div class="tile"><b>$rmse</b><span>root mean square distance of those from where they were</span></div>
<div class="tile"><b>$smaller</b><span>fewer numbers in the code than in the grid;
trained in $training_time</span></div>
</div>

<section>
<h2>Turn one</h2>
<p>Left: the molecule that went in. Right: the atoms found in what the autoencoder returned. The glass is where
the wave is in its trough, around every atom. Drag to turn both.</p>
<div class="pick" id="names"></div>
<div class="views">
<div class="view"><canvas id="before" aria-label="The molecule that went in"></canvas><span>put in</span></div>
<div class="view"><canvas id="after" aria-label="The atoms that came back"></canvas>
<span id="count">came back</span></div>
</div>
<div class="pick"><div class="legend">$legend</div><div class="gap"></div>
<button data-layer="atoms" aria-pressed="true">atoms</button>
<button data-layer="crests" aria-pressed="false">wave crests</button>
<button data-layer="glass" aria-pressed="true">wave troughs</button></div>
<div class="smiles" id="smiles"></div>
<p class="note">A pink ring marks an atom found where there is none, or of another element; a dashed circle an atom that
was missed. Bonds are drawn between atoms as near as a bond, on both sides alike. Crests are drawn above one half of
an atom's peak: the autoencoder softens many to less, and the atom is still found, as find_atoms fits the whole
wave.</p>
<noscript><p>The viewer needs JavaScript; everything else on this page does not.</p></noscript>
</section>

<section>
<h2>Before and after</h2>
<p>Test molecules lying flat. Glass: the troughs of the wave grid, below −0.3 of an atom's peak. Beads, in the colour of
the element: above, the atoms that were drawn; below, those found in what came back.</p>
<div class="rows"><div class="side"><span>the grid</span><span>after the autoencoder</span></div>$gallery</div>
</section>

<section>
<h2>Four ways to draw the same atoms</h2>
<p>The middle plane of one molecule, all elements added. One-hot marks a voxel an atom, so almost every voxel is
empty; a Gaussian fills space but melts neighbours into one; a wave fills as much space and keeps them apart.</p>
<div class="heads"><span>one-hot</span><span>Gaussian, σ 0.5 Å</span>
<span>Gaussian, σ 1 Å</span><span>wave, σ $sigma Å, ω $omega / Å</span></div>
$slices
<p class="note">Teal is positive, orange negative, the opacity is the value. The one-hot picture shows all planes at
once, or it would be empty.</p>
</section>

<section>
<h2>Atoms found</h2>
<div class="two">
<div><p>Found in what the autoencoder returned, by element:</p>$element_table
<p class="note">An atom is right if one of its element is within $gate Å and neither is paired with a nearer one.
Bromine, chlorine, fluorine and iodine share a channel. find_atoms is told a noise of $noise, the autoencoder's error on
molecules it was trained with.</p></div>
<div><p>Found in grids with white noise, given in parts of an atom's peak:</p>$noise_chart
<p class="note">F1 is the harmonic mean of precision and recall. find_atoms is told the noise. One-hot grids have no
kernel to undo: their atoms are the voxels above one half.</p></div>
</div>
<details><summary>All conditions, precision / recall / rmse by element</summary>$details
<p class="note">precision % / recall % / rmse Å. The number of true atoms is in the head.</p></details>
<details><summary>All conditions, all elements together</summary>$condition_table</details>
</section>

<section>
<h2>The network and its training</h2>
<div class="two">
<div>$loss_chart
<p class="note">Squared error over each channel's spread, averaged over channels; faint: every step.</p></div>
<div><p>A convolutional autoencoder of $parameters weights: residual blocks of separable convolutions and a linear
output layer, as waves have a sign. A grid of $voxels numbers ($shape³ voxels of 0.5 Å) becomes a code of $latent
($latent_cell, one vector for each cube of 2 Å) and is drawn again.</p>
<p>Trained on $train_molecules molecules in random poses: $steps steps of $batch, on boxes of $crop³ voxels: a
convolution takes any size, and the smaller is cheaper. Squared error left on the test
molecules, as part of their mean square: $residual.</p>
<p class="note">Each channel's error is divided by its spread to the power $power, not by the spread itself: that would
make a halogen as dear as all carbons together, and carbons are what is hard to tell apart.</p></div>
</div>
</section>

<section>
<h2>Speed, measured in this run</h2>
<div class="two"><div>$speed_table</div>
<div><p>On $machine. Voxelize: all $tested test molecules in one call, into a grid that is used again, each
molecule turned inside the kernel. Find atoms: at 10 % noise. Training: forward, backward and the grids.</p>
<p>The whole run took $total_time ($stages).</p></div></div>
</section>

<section>
<h2>What was used</h2>
<p>$read records; left out: $left_out. One conformer each (ETKDGv3, no force field), hydrogens removed. Boxes of
$edge Å hold molecules whose atoms are all within 7 Å of the centre.</p>
<p class="note">Seed $seed · $versions · The wave transform: Kuzminykh et al., Molecular Pharmaceutics 15 (10), 2018,
doi 10.1021/acs.molpharmaceut.7b01134. Kernel widths and the network are this library's own.</p>
</section>
</main>

<script type="application/json" id="data">$viewer</script>
<script>
(function () {
  "use strict";
  var data = JSON.parse(document.getElementById("data").textContent), colors = $colors;
  var layers = { atoms: true, crests: false, glass: true }, chosen = 0, span = 1, moved = false;
  var turn = [1, 0, 0, 0, 1, 0, 0, 0, 1];
  var light = [-0.4, 0.55, 0.73], sprites = {};

  function unpack(text, Kind) {
    var raw = atob(text), bytes = new Uint8Array(raw.length);
    for (var i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return new Kind(bytes.buffer);
  }
  function rgb(color) {
    return [1, 3, 5].map(function (at) { return parseInt(color.substr(at, 2), 16); });
  }
  function mix(color, other, part) {
    return "rgb(" + rgb(color).map(function (v, i) { return Math.round(v + (other[i] - v) * part); }) + ")";
  }
  // A sphere is drawn once for each colour and then only copied.
  function sprite(color) {
    if (sprites[color]) return sprites[color];
    var canvas = document.createElement("canvas"), size = 128, pen = canvas.getContext("2d");
    canvas.width = canvas.height = size;
    var fill = pen.createRadialGradient(size * 0.36, size * 0.32, size * 0.02, size * 0.5, size * 0.5, size * 0.5);
    fill.addColorStop(0, mix(color, [255, 255, 255], 0.85));
    fill.addColorStop(0.25, mix(color, [255, 255, 255], 0.3));
    fill.addColorStop(0.7, color);
    fill.addColorStop(1, mix(color, [0, 0, 0], 0.45));
    pen.fillStyle = fill;
    pen.beginPath();
    pen.arc(size / 2, size / 2, size / 2 - 1, 0, 7);
    pen.fill();
    return (sprites[color] = canvas);
  }
  function rotate(p, m) {
    return [m[0] * p[0] + m[1] * p[1] + m[2] * p[2], m[3] * p[0] + m[4] * p[1] + m[5] * p[2],
      m[6] * p[0] + m[7] * p[1] + m[8] * p[2]];
  }
  function product(a, b) {
    var c = [];
    for (var i = 0; i < 3; i++) for (var j = 0; j < 3; j++)
      c.push(a[3 * i] * b[j] + a[3 * i + 1] * b[3 + j] + a[3 * i + 2] * b[6 + j]);
    return c;
  }
  function spin(dx, dy) {
    var c = Math.cos(dx), s = Math.sin(dx), d = Math.cos(dy), t = Math.sin(dy);
    turn = product(product([1, 0, 0, 0, d, -t, 0, t, d], [c, 0, s, 0, 1, 0, -s, 0, c]), turn);
  }
  data.forEach(function (molecule) {
    [molecule.before, molecule.after].forEach(function (side) {
      side.points = unpack(side.points, Int16Array);
      side.faces = unpack(side.faces, Uint16Array);
      side.kinds = unpack(side.kinds, Int8Array);
    });
  });

  function triangles(side, out) {
    var n = side.points.length / 3, seen = new Float32Array(side.points.length);
    for (var i = 0; i < n; i++) {
      var p = rotate([side.points[3 * i] / 1000, side.points[3 * i + 1] / 1000, side.points[3 * i + 2] / 1000], turn);
      seen.set(p, 3 * i);
    }
    for (var f = 0; f < side.kinds.length; f++) {
      var kind = side.kinds[f];
      if (!layers[kind < 0 ? "glass" : "crests"]) continue;
      var a = 3 * side.faces[3 * f], b = 3 * side.faces[3 * f + 1], c = 3 * side.faces[3 * f + 2];
      var u = [seen[b] - seen[a], seen[b + 1] - seen[a + 1], seen[b + 2] - seen[a + 2]];
      var v = [seen[c] - seen[a], seen[c + 1] - seen[a + 1], seen[c + 2] - seen[a + 2]];
      var x = u[1] * v[2] - u[2] * v[1], y = u[2] * v[0] - u[0] * v[2], z = u[0] * v[1] - u[1] * v[0];
      var length = Math.sqrt(x * x + y * y + z * z) || 1;
      var lit = (x * light[0] + y * light[1] + z * light[2]) / length, style;
      if (kind < 0) {
        var edge = 1 - Math.abs(z) / length;
        style = "rgba(127,167,217," + (0.05 + 0.30 * edge * edge).toFixed(3) + ")";
      } else style = mix(colors[kind], [0, 0, 0], 0.5 - 0.5 * Math.max(0, lit));
      out.push([(seen[a + 2] + seen[b + 2] + seen[c + 2]) / 3, 0, style, seen, a, b, c]);
    }
  }
  function draw(canvas, side) {
    var scale = window.devicePixelRatio || 1, box = canvas.getBoundingClientRect();
    canvas.width = box.width * scale;
    canvas.height = box.height * scale;
    var pen = canvas.getContext("2d"), zoom = Math.min(canvas.width, canvas.height) / 2 / span;
    pen.translate(canvas.width / 2, canvas.height / 2);
    var list = [];
    triangles(side, list);
    var at = side.atoms.map(function (atom) { return rotate(atom, turn); });
    if (layers.atoms) {
      side.bonds.forEach(function (bond) {
        var p = at[bond[0]], q = at[bond[1]], m = [0, 1, 2].map(function (i) { return (p[i] + q[i]) / 2; });
        list.push([(p[2] + m[2]) / 2, 1, colors[side.atoms[bond[0]][3]], p, m]);
        list.push([(q[2] + m[2]) / 2, 1, colors[side.atoms[bond[1]][3]], q, m]);
      });
      side.atoms.forEach(function (atom, i) { list.push([at[i][2], 2, colors[atom[3]], at[i]]); });
    }
    (side.missed || []).forEach(function (atom) {
      var p = rotate(atom, turn);
      list.push([p[2], 4, colors[atom[3]], p]);
    });
    if (side.missed) side.atoms.forEach(function (atom, i) {
      if (!atom[4]) list.push([at[i][2] + 0.5, 3, "#d6208b", at[i]]);
    });
    list.sort(function (a, b) { return a[0] - b[0]; });
    list.forEach(function (item) {
      var p = item[3];
      if (item[1] === 0) {
        pen.fillStyle = item[2];
        pen.beginPath();
        pen.moveTo(p[item[4]] * zoom, -p[item[4] + 1] * zoom);
        pen.lineTo(p[item[5]] * zoom, -p[item[5] + 1] * zoom);
        pen.lineTo(p[item[6]] * zoom, -p[item[6] + 1] * zoom);
        pen.fill();
      } else if (item[1] === 1) {
        pen.lineCap = "round";
        [[0.17, 0.25], [0.09, 0]].forEach(function (stroke) {
          pen.lineWidth = 2 * stroke[0] * zoom;
          pen.strokeStyle = mix(item[2], [0, 0, 0], stroke[1]);
          pen.beginPath();
          pen.moveTo(p[0] * zoom, -p[1] * zoom);
          pen.lineTo(item[4][0] * zoom, -item[4][1] * zoom);
          pen.stroke();
        });
      } else if (item[1] === 2) {
        var r = 0.42 * zoom;
        pen.drawImage(sprite(item[2]), p[0] * zoom - r, -p[1] * zoom - r, 2 * r, 2 * r);
      } else {
        pen.lineWidth = 2 * scale;
        pen.strokeStyle = item[2];
        pen.setLineDash(item[1] === 4 ? [4 * scale, 4 * scale] : []);
        pen.beginPath();
        pen.arc(p[0] * zoom, -p[1] * zoom, (item[1] === 4 ? 0.45 : 0.6) * zoom, 0, 7);
        pen.stroke();
        pen.setLineDash([]);
      }
    });
  }
  var canvases = ["before", "after"].map(function (id) { return document.getElementById(id); }), waiting = false;
  function redraw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(function () {
      waiting = false;
      draw(canvases[0], data[chosen].before);
      draw(canvases[1], data[chosen].after);
    });
  }
  function choose(index) {
    chosen = index;
    var molecule = data[index], right = molecule.after.atoms.filter(function (atom) { return atom[4]; }).length;
    span = 1.5 + Math.max.apply(null, molecule.before.atoms.map(function (a) { return Math.hypot(a[0], a[1], a[2]); }));
    document.getElementById("smiles").textContent = molecule.smiles;
    document.getElementById("count").textContent = "came back: " + right + " of " + molecule.before.atoms.length +
      " atoms, " + (molecule.after.atoms.length - right) + " wrong";
    Array.prototype.forEach.call(names.children, function (b, i) { b.setAttribute("aria-pressed", i === index); });
    redraw();
  }
  var names = document.getElementById("names");
  data.forEach(function (molecule, index) {
    var button = document.createElement("button");
    button.textContent = molecule.name;
    button.onclick = function () { choose(index); };
    names.appendChild(button);
  });
  document.querySelectorAll("[data-layer]").forEach(function (button) {
    button.onclick = function () {
      layers[button.dataset.layer] = !layers[button.dataset.layer];
      button.setAttribute("aria-pressed", layers[button.dataset.layer]);
      redraw();
    };
  });
  canvases.forEach(function (canvas) {
    canvas.onpointerdown = function (event) { canvas.setPointerCapture(event.pointerId); moved = true; };
    canvas.onpointermove = function (event) {
      if (event.buttons) { spin(event.movementX / 120, event.movementY / 120); redraw(); }
    };
  });
  window.addEventListener("resize", redraw);
  // It turns by itself until somebody takes it, so that one sees that it can be turned.
  if (!window.matchMedia("(prefers-reduced-motion: reduce)").matches) setInterval(function () {
    if (!moved && !document.hidden) { spin(0.006, 0); redraw(); }
  }, 40);
  spin(0.3, 0.35);
  choose(0);
})();
</script>
</body>
</html>
"""
)
