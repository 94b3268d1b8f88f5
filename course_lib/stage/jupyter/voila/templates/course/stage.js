// Keys that work wherever the focus is, a view as large as the window allows, and no kernel without a page.
(() => {
  const MOVES = {ArrowRight: "ArrowRight", ArrowLeft: "ArrowLeft", PageDown: "ArrowRight", PageUp: "ArrowLeft"};
  const shown = selector => [...document.querySelectorAll(selector)].find(one => one.offsetParent !== null);
  const typing = target => target.closest("input, textarea, [contenteditable=true]") !== null;

  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const press = name => { const button = shown(`button.stage-${name}, .stage-${name} button`); if (button) button.click(); };
    const remote = event.key.startsWith("Page");
    if (event.key in MOVES) {
      // an arrow belongs to the text that is written and to the slider that was chosen; a remote always to the main slider
      if (!remote && (typing(event.target) || event.target.closest(".noUi-handle"))) return;
      const handle = shown(".stage-main .noUi-handle");
      if (!handle) return;
      event.preventDefault();
      event.stopPropagation();
      handle.dispatchEvent(new KeyboardEvent("keydown", {key: MOVES[event.key], bubbles: true, cancelable: true}));
    } else if (!typing(event.target) && !event.target.closest("select")) {
      if (event.key === "r") press("reset");
      if (event.key === "s") press("surprise");
      if (event.key === "f") {
        if (document.fullscreenElement) document.exitFullscreen(); else document.documentElement.requestFullscreen();
      }
    }
  }, true);

  // A page that closes takes its kernel along, also one that is busy.
  window.addEventListener("pagehide", () => {
    const {baseUrl, kernelId} = JSON.parse(document.getElementById("jupyter-config-data").textContent);
    navigator.sendBeacon(`${baseUrl}voila/api/shutdown/${kernelId}`);
  });

  // The view is made for 900 screen pixels; scaled, it fills the window to its right and lower edge.
  const fit = () => {
    const view = shown(".stage-view");
    if (!view || !view.offsetWidth) return;
    const {left} = view.parentElement.getBoundingClientRect(), {top} = view.getBoundingClientRect(), words = 44;
    const [across, down] = [innerWidth - left - 20, innerHeight - top - scrollY - words]; // a line of words may follow
    const scale = Math.max(0.5, Math.min(across / view.offsetWidth, down / view.offsetHeight));
    if (Math.abs(scale - (view.courseScale || 0)) < 0.005) return;
    view.courseScale = scale;
    view.style.transform = `scale(${scale})`;
    view.style.marginBottom = `${(scale - 1) * view.offsetHeight}px`;
    view.style.marginLeft = `${Math.max(0, (across - scale * view.offsetWidth) / 2)}px`;
  };
  window.addEventListener("resize", fit);
  document.addEventListener("fullscreenchange", fit);
  document.addEventListener("DOMContentLoaded", () => {
    const sizes = new ResizeObserver(fit);
    const watch = new MutationObserver(() => {
      for (const one of document.querySelectorAll(".stage-view, .stage-explorer, .stage-bar, .stage-controls")) sizes.observe(one);
      fit();
    });
    watch.observe(document.body, {childList: true, subtree: true});
  });
})();
