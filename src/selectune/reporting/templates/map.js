(() => {
  const figure = document.currentScript.parentElement, picture = figure.querySelector("svg"), card = figure.querySelector(".card");
  const { signals, points } = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
  const spot = picture.querySelector(".spot");
  const line = (kind, text) => { const made = document.createElement("div"); made.className = kind; made.textContent = text; return made; };
  let shown = null;
  const hide = () => { card.hidden = true; spot.setAttribute("cx", -20); shown = null; };
  const show = event => {
    const frame = picture.getBoundingClientRect(), scale = figure.dataset.width / frame.width;
    const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
    let best = null, least = (18 * scale) ** 2;
    for (const point of points) {
      const far = (point[0] - x) ** 2 + (point[1] - y) ** 2;
      if (far < least) { least = far; best = point; }
    }
    if (!best) return hide();
    if (best === shown) return;
    shown = best;
    const [left, top, kept, question, response, place, values, reason] = best;
    spot.setAttribute("cx", left); spot.setAttribute("cy", top);
    card.replaceChildren(
      line(kept ? "said kept" : "said", kept ? "kept" : "left out"), line("asked", question), line("", response),
      ...signals.map((name, index) => line("sub", `${name}: ${values[index]}`)), ...(reason ? [line("sub", reason)] : []), line("sub", place));
    card.hidden = false;
    const wide = card.offsetWidth, high = card.offsetHeight, at = [left / scale, top / scale];
    card.style.left = `${Math.max(0, at[0] + 14 + wide > frame.width ? at[0] - 14 - wide : at[0] + 14)}px`;
    card.style.top = `${Math.max(0, Math.min(at[1] - high / 2, frame.height - high))}px`;
  };
  picture.addEventListener("pointermove", show);
  picture.addEventListener("pointerdown", show);
  picture.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
})();
