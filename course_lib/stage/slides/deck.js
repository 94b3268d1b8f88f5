// Formulas first, then slides are filled by measured heights, then reveal.js. A slide with too much on it is
// set smaller, and scrolls where that is not enough: the key that moves on then scrolls first, so nothing is unseen.
(async () => {
  const SMALLEST = 0.72;
  await MathJax.startup.promise;
  await MathJax.typesetPromise();

  // As many blocks a slide as fit, with a little for which it is set smaller; no heading ends a slide.
  const GAP = 12, ROOM = 704 * 1.06, RUNNING = 40;
  let used = 0, heading = "", now = null;
  const begin = words => {
    const section = document.createElement("section");
    now = document.createElement("div");
    now.className = "page";
    if (words) now.append(Object.assign(document.createElement("p"), {className: "running", innerHTML: words}));
    section.append(now);
    document.querySelector(".slides").append(section);
    used = words ? RUNNING : 0;
  };
  const waiting = document.querySelector(".waiting"), blocks = [...waiting.querySelectorAll(".block")];
  const heights = new Map(blocks.map(one => [one, one.getBoundingClientRect().height + GAP]));
  for (const block of blocks) {
    if (block.dataset.begins || !now) {
      heading = block.dataset.heading ? block.querySelector("h1, h2, h3, h4").innerHTML : "";
      begin("");
    } else if (used + heights.get(block) > ROOM && now.querySelector(".block")) {
      const last = now.lastElementChild, along = last.dataset.heading && now.childElementCount > 1;
      begin(heading);
      if (along) { now.append(last); used += heights.get(last); }
    }
    now.append(block);
    used += heights.get(block);
  }
  waiting.remove();

  const page = () => Reveal.getCurrentSlide().querySelector(".page");
  const over = one => one.scrollHeight > one.clientHeight + 2 || one.scrollWidth > one.clientWidth + 2;
  const fit = () => {
    const one = page();
    if (!one || one.dataset.fits) return;
    for (let size = 1; over(one) && size > SMALLEST; size -= 0.04) {
      one.style.fontSize = `${size}em`;
      one.style.setProperty("--size", size);
    }
    if (over(one)) one.classList.add("scrolls");
    one.dataset.fits = "yes";
  };
  const forward = () => {
    const one = page();
    if (one && one.scrollTop + one.clientHeight < one.scrollHeight - 4) one.scrollBy(0, 0.8 * one.clientHeight);
    else Reveal.next();
  };
  const back = () => {
    const one = page();
    if (one && one.scrollTop > 4) one.scrollBy(0, -0.8 * one.clientHeight);
    else Reveal.prev();
  };
  const keyboard = {};
  for (const key of [32, 34, 39, 40, 78, 13]) keyboard[key] = forward; // space, page down, right, down, n, enter
  for (const key of [33, 37, 38, 80]) keyboard[key] = back; // page up, left, up, p
  Reveal.on("ready", fit);
  Reveal.on("slidechanged", fit);
  await Reveal.initialize({...SIZE, margin: 0.035, center: false, hash: true, transition: "none", slideNumber: "c/t",
                           keyboard, controls: false});
  document.body.dataset.ready = "yes";
})();
