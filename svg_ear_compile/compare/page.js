"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const { layout, names, clips } = data;
  const LISTED = 60;
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
  const stage = at("stage");
  const canvases = [at("canvas-left"), at("canvas-right")];
  // Small clips are drawn larger, so that the wipe's line stays thin on them.
  const scale = Math.max(1, Math.ceil(640 / layout.width));
  const state = {
    clip: 0, left: 0, right: data.recommended || Math.min(1, names.length - 1),
    view: "side", frame: 0, playing: false, speed: 1, divider: 0.5,
  };

  const colour = (setting) => setting === 0 ? "var(--dense)" : `var(--s${(setting - 1) % data.colours})`;
  const dash = (setting) => DASHES[Math.floor(Math.max(0, setting - 1) / data.colours) % DASHES.length];
  const decibels = (value) => value === null ? "equal" : `${value.toFixed(1)} dB`;
  const entry = (setting) => clips[state.clip].settings[setting];
  const count = () => entry(0).curves.flicker.length;

  // Pictures are decoded when they are first shown, and let go when another clip is.
  let pictures = new Map();
  function picture(uri) {
    if (!pictures.has(uri)) {
      const image = new Image();
      image.onload = draw;
      image.src = uri;
      pictures.set(uri, image);
    }
    const image = pictures.get(uri);
    return image.complete && image.naturalWidth > 0 ? image : null;
  }

  function paint(canvas, sheets, from, to) {
    const each = layout.columns * layout.rows;
    const place = state.frame % each;
    const image = picture(sheets[Math.floor(state.frame / each)]);
    if (image === null) return;
    const x = (place % layout.columns) * layout.pitch_x;
    const y = Math.floor(place / layout.columns) * layout.pitch_y;
    const left = Math.round(from * layout.width);
    const width = Math.round(to * layout.width) - left;
    if (width > 0) {
      const pen = canvas.getContext("2d");
      pen.imageSmoothingQuality = "high";
      pen.drawImage(image, x + left, y, width, layout.height, scale * left, 0, scale * width, scale * layout.height);
    }
  }

  function draw() {
    const [left, right] = canvases;
    if (state.view === "wipe") {
      paint(left, entry(state.left).sheets, 0, state.divider);
      paint(left, entry(state.right).sheets, state.divider, 1);
      const pen = left.getContext("2d");
      pen.fillStyle = "#fff";
      pen.fillRect(state.divider * left.width - 1, 0, 2, left.height);
    } else if (state.view === "difference") {
      paint(left, entry(state.left).sheets, 0, 1);
      const differences = entry(state.right).differences;
      if (differences.length) {
        paint(right, differences, 0, 1);
      } else {
        right.getContext("2d").clearRect(0, 0, right.width, right.height);
      }
    } else {
      paint(left, entry(state.left).sheets, 0, 1);
      paint(right, entry(state.right).sheets, 0, 1);
    }
    label();
    moveCursors();
  }

  function label() {
    const of = (setting) => setting === 0 ? "" : decibels(entry(setting).curves.psnr[state.frame]);
    const difference = state.view === "difference";
    at("left-figure").textContent = of(state.left);
    at("right-figure").textContent = of(state.right);
    canvases[0].setAttribute("aria-label", names[state.left]);
    canvases[1].setAttribute("aria-label", `${names[state.right]}${difference ? ", difference from dense" : ""}`);
    at("frame").textContent = `${state.frame + 1} / ${count()}`;
    at("time").value = state.frame;
  }

  function show(changes) {
    Object.assign(state, changes);
    if ("clip" in changes) {
      pictures = new Map();
      state.frame = Math.min(state.frame, count() - 1);
      at("time").max = count() - 1;
      // In full where the list cuts it.
      const { prompt } = clips[state.clip];
      at("prompt").textContent = prompt.length > LISTED ? prompt : "";
    }
    if ("clip" in changes || "left" in changes || "right" in changes) drawCurves();
    at("clip").value = state.clip;
    for (const side of ["left", "right"]) {
      at(side).value = state[side];
      at(side).style.setProperty("--c", colour(state[side]));
    }
    document.querySelector(`input[name=view][value=${state.view}]`).checked = true;
    stage.className = `stage ${state.view}`;
    at("hint").hidden = state.view !== "difference";
    at("divider-label").hidden = state.view !== "wipe";
    at("divider").value = Math.round(100 * state.divider);
    draw();
  }

  // Play: the clock says which frame is due, so that a slow machine skips and never lags.
  let started = null;
  function tick(now) {
    if (!state.playing) return;
    if (started === null) started = now - (1000 * state.frame) / (data.fps * state.speed);
    const due = Math.floor(((now - started) / 1000) * data.fps * state.speed) % count();
    if (due !== state.frame) {
      state.frame = due;
      draw();
    }
    requestAnimationFrame(tick);
  }
  function play(on) {
    started = null;
    if (on && !state.playing) requestAnimationFrame(tick);
    state.playing = on;
    at("play-sign").setAttribute("d", on ? "M3 2h4v12H3zM9 2h4v12H9z" : "M4 2l10 6-10 6z");
    at("play").setAttribute("aria-pressed", on);
  }
  const seek = (frame) => { play(false); show({ frame: (frame + count()) % count() }); };

  // Curves.
  const SVG = "http://www.w3.org/2000/svg";
  const BOX = { width: 420, height: 190, left: 58, right: 10, top: 10, bottom: 24 };
  const KINDS = [
    { key: "psnr", name: "PSNR, dB", digits: 1, dense: false },
    { key: "ssim", name: "SSIM", digits: 3, dense: false },
    { key: "flicker", name: "Flicker, in 1/255", digits: 2, dense: true },
  ];
  let cursors = [];

  function element(kind, attributes, parent, text) {
    const made = document.createElementNS(SVG, kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  function ticks(low, high) {
    const rough = (high - low) / 4;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * unit).find((s) => s >= rough);
    const found = [];
    for (let n = Math.ceil(low / step); n * step <= high; n += 1) found.push(n * step);
    return { values: found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  }

  function drawCurves() {
    const settings = names.map((_, setting) => setting);
    const legend = at("legend");
    legend.replaceChildren(...settings.map((setting) => {
      const item = document.createElement("span");
      const sign = element("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" }, item);
      element("path", { d: "M0 5H26", class: "curve shown", "stroke-dasharray": dash(setting), style: `--c:${colour(setting)}` }, sign);
      item.append(names[setting]);
      return item;
    }));
    cursors = [];
    at("curves").replaceChildren(...KINDS.map((kind) => curve(kind, settings)));
    moveCursors();
  }

  function curve(kind, settings) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const value = document.createElement("output");
    caption.append(kind.name, value);
    const svg = element("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": `${kind.name} of every frame` }, figure);
    figure.prepend(caption);
    const lines = settings.filter((s) => kind.dense || s > 0).map((s) => [s, entry(s).curves[kind.key]]);
    const known = lines.flatMap(([, values]) => values.filter((v) => v !== null));
    const right = BOX.width - BOX.right, floor = BOX.height - BOX.bottom;
    if (!known.length) {
      element("text", { x: BOX.left, y: BOX.height / 2 }, svg, kind.key === "psnr" ? "every frame is equal" : "too few frames");
      return figure;
    }
    let low = Math.min(...known), high = Math.max(...known);
    const space = (high - low) * 0.08 || Math.abs(high) * 0.02 || 1;
    low = kind.key === "flicker" ? 0 : low - space;
    high = kind.key === "ssim" ? Math.min(high + space, Math.max(1, high)) : high + space;
    if (high === low) low -= 1e-3;
    const last = Math.max(1, count() - 1);
    const x = (frame) => BOX.left + ((right - BOX.left) * frame) / last;
    const y = (v) => floor - ((floor - BOX.top) * ((v === null ? high : v) - low)) / (high - low);
    const marks = ticks(low, high);
    for (const tick of marks.values) {
      element("path", { class: "grid", d: `M${BOX.left} ${y(tick)}H${right}` }, svg);
      element("text", { x: BOX.left - 6, y: y(tick) + 4, "text-anchor": "end" }, svg, tick.toFixed(marks.digits));
    }
    element("text", { x: BOX.left, y: BOX.height - 6 }, svg, "frame 1");
    element("text", { x: right, y: BOX.height - 6, "text-anchor": "end" }, svg, String(count()));
    // The shown setting last, on top of the others.
    lines.sort(([a], [b]) => (a === state.right) - (b === state.right));
    for (const [setting, values] of lines) {
      // A frame equal to dense has infinite PSNR: its place is the upper edge.
      const points = values.map((v, f) => v === null && kind.key === "flicker" ? "" : `${x(f).toFixed(1)} ${y(v).toFixed(1)}`).filter(Boolean);
      const path = { d: `M${points.join("L")}`, class: setting === state.right ? "curve shown" : "curve", "stroke-dasharray": dash(setting), style: `--c:${colour(setting)}` };
      if (points.length) element("path", path, svg);
    }
    const cursor = element("path", { class: "cursor" }, svg);
    const dot = element("circle", { class: "at", r: 4, style: `--c:${colour(state.right)}` }, svg);
    const values = entry(state.right).curves[kind.key];
    cursors.push(() => {
      const now = values[state.frame];
      cursor.setAttribute("d", `M${x(state.frame)} ${BOX.top}V${floor}`);
      const missing = values.length === 0 || (now === null && kind.key === "flicker");
      dot.setAttribute("visibility", missing ? "hidden" : "visible");
      if (!missing) {
        dot.setAttribute("cx", x(state.frame));
        dot.setAttribute("cy", y(now));
      }
      value.textContent = missing ? "–" : now === null ? "equal" : now.toFixed(kind.digits);
    });
    const point = (event) => {
      const box = svg.getBoundingClientRect();
      const inside = ((event.clientX - box.left) / box.width) * BOX.width;
      seek(Math.min(last, Math.max(0, Math.round(((inside - BOX.left) / (right - BOX.left)) * last))) % count());
    };
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointermove", (event) => { if (event.buttons) point(event); });
    return figure;
  }
  const moveCursors = () => cursors.forEach((move) => move());

  // Controls.
  clips.forEach((clip, index) => {
    const short = clip.prompt.length > LISTED ? `${clip.prompt.slice(0, LISTED - 1)}…` : clip.prompt;
    at("clip").append(new Option(`${short} (seed ${clip.seed})`, index));
  });
  for (const side of ["left", "right"]) {
    names.forEach((name, index) => at(side).append(new Option(index && index === data.recommended ? `${name} ★` : name, index)));
    at(side).addEventListener("change", (event) => show({ [side]: Number(event.target.value) }));
  }
  at("clip-label").hidden = clips.length < 2;
  at("clip").addEventListener("change", (event) => show({ clip: Number(event.target.value) }));
  at("views").addEventListener("change", (event) => show({ view: event.target.value }));
  at("divider").addEventListener("input", (event) => show({ divider: event.target.value / 100 }));
  at("time").addEventListener("input", (event) => seek(Number(event.target.value)));
  at("speed").addEventListener("change", (event) => { started = null; state.speed = Number(event.target.value); });
  at("play").addEventListener("click", () => play(!state.playing));
  const wipe = (event) => {
    const box = canvases[0].getBoundingClientRect();
    show({ divider: Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) });
  };
  canvases[0].addEventListener("pointerdown", (event) => {
    if (state.view !== "wipe") return play(!state.playing);
    canvases[0].setPointerCapture(event.pointerId);
    wipe(event);
  });
  canvases[0].addEventListener("pointermove", (event) => { if (state.view === "wipe" && event.buttons) wipe(event); });
  canvases[1].addEventListener("pointerdown", () => play(!state.playing));
  at("copy").addEventListener("click", () => {
    const range = document.createRange();
    range.selectNodeContents(at("code"));
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    // From a file the clipboard may be closed; the text stays selected for the keyboard then.
    const said = (text) => { at("copy").textContent = text; setTimeout(() => { at("copy").textContent = "Copy"; }, 1600); };
    if (!navigator.clipboard) return said("Selected");
    navigator.clipboard.writeText(at("code").textContent).then(() => said("Copied"), () => said("Selected"));
  });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target.closest("input, select, button, textarea");
    // Keys that a control uses itself stay its own.
    const typing = target && target.matches("select, input[type=range], input[type=radio]");
    const key = event.key.toLowerCase();
    if (key === " " && !(target && target.matches("button, select"))) {
      play(!state.playing);
    } else if ((key === "arrowleft" || key === "arrowright") && !typing) {
      seek(state.frame + (key === "arrowleft" ? -1 : 1));
    } else if ((key === "home" || key === "end") && !typing) {
      seek(key === "home" ? 0 : count() - 1);
    } else if ("swd".includes(key) && key.length === 1 && !(target && target.matches("select"))) {
      show({ view: { s: "side", w: "wipe", d: "difference" }[key] });
    } else if (/^[1-9]$/.test(key) && !(target && target.matches("select"))) {
      if (Number(key) < names.length) show({ right: Number(key) });
    } else {
      return;
    }
    event.preventDefault();
  });

  document.body.classList.toggle("tall", layout.height > layout.width);
  stage.style.setProperty("--ratio", layout.width / layout.height);
  for (const canvas of canvases) {
    canvas.width = scale * layout.width;
    canvas.height = scale * layout.height;
  }
  // `#clip=2&right=3&view=wipe&frame=7` opens the page there.
  const wanted = new URLSearchParams(location.hash.slice(1));
  const opened = { clip: 0 };
  for (const [name, end] of [["clip", clips.length], ["left", names.length], ["right", names.length], ["frame", Infinity]]) {
    const value = Number(wanted.get(name));
    if (wanted.has(name) && Number.isInteger(value) && value >= 0 && value < end) opened[name] = value;
  }
  if (["side", "wipe", "difference"].includes(wanted.get("view"))) opened.view = wanted.get("view");
  show(opened);
  const still = wanted.has("frame") || matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (!still && count() > 1) play(true);
})();
