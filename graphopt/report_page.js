"use strict";
{
  const PAPER_PX = 680; // A4 less its margins
  const plots = [...document.querySelectorAll(".plot")];
  const settings = { displayModeBar: false, responsive: true };

  for (const plot of plots) {
    const figure = JSON.parse(document.getElementById(`${plot.id}-json`).textContent);
    Plotly.newPlot(plot, figure.data, figure.layout, settings);
  }

  // On paper nothing can be opened, and a figure as wide as the screen would be cut off.
  let closed = [];
  const prepare = () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const part of closed) part.open = true;
    for (const plot of plots) Plotly.relayout(plot, { width: PAPER_PX, autosize: false });
  };
  const restore = () => {
    for (const part of closed) part.open = false;
    for (const plot of plots) Plotly.relayout(plot, { width: null, autosize: true });
  };
  window.addEventListener("beforeprint", prepare);
  window.addEventListener("afterprint", restore);
}
