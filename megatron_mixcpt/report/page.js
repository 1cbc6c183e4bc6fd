"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");
  const show = (theme) => {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light" : "Dark";
  };
  show(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => show(dark.matches ? "dark" : "light"));
  button.addEventListener("click", () => show(root.dataset.theme === "dark" ? "light" : "dark"));

  const frame = { left: 62, right: 14, top: 12, bottom: 40, width: 600, height: 270 };  // of figures.py
  const tip = document.getElementById("tip");
  const text = (value) => (Math.abs(value) >= 1e5 || (value !== 0 && Math.abs(value) < 1e-3)
    ? value.toExponential(3) : String(Number(value.toPrecision(5))));

  function nearest(points, x) {
    let low = 0, high = points.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (points[middle][0] < x) low = middle; else high = middle;
    }
    return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? points[low] : points[high];
  }

  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
    cursor.setAttribute("class", "cursor");
    cursor.setAttribute("y1", frame.top);
    cursor.setAttribute("y2", frame.height - frame.bottom);
    cursor.style.display = "none";
    svg.append(cursor);
    const hide = () => { tip.hidden = true; cursor.style.display = "none"; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const across = frame.width - frame.left - frame.right;
      const share = ((event.clientX - box.left) / box.width * frame.width - frame.left) / across;
      const wanted = chart.x[0] + Math.min(1, Math.max(0, share)) * (chart.x[1] - chart.x[0]);
      const found = chart.series.filter((one) => one.points.length).map((one) => [one, nearest(one.points, wanted)]);
      if (!found.length) return hide();
      const at = found.map((pair) => pair[1][0]).reduce((a, b) => (Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a));
      const x = frame.left + across * (at - chart.x[0]) / (chart.x[1] - chart.x[0]);
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.style.display = "";
      tip.replaceChildren();
      const head = document.createElement("div");
      head.textContent = `${chart.label} ${at.toLocaleString("en")}`;
      head.className = "soft";
      tip.append(head);
      for (const [one, point] of found) {
        const line = document.createElement("div");
        line.className = `key c${one.colour}`;
        const value = document.createElement("b");
        value.textContent = text(point[1]);
        line.append(`${one.name} `, value);
        tip.append(line);
      }
      tip.hidden = false;
      const size = tip.getBoundingClientRect();
      const left = event.clientX + 16 + size.width > innerWidth ? event.clientX - 16 - size.width : event.clientX + 16;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.max(4, Math.min(event.clientY - 10, innerHeight - size.height - 4))}px`;
    });
  }
})();
