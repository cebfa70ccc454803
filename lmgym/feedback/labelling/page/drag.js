// Dragging by pointer events, which a mouse, a pen and a finger all send.

export function makeDraggable(chip, drop) {
  chip.addEventListener("pointerdown", (down) => {
    if (down.button !== 0) return;
    const ghost = chip.cloneNode(true);
    ghost.id = "ghost";
    ghost.setAttribute("aria-hidden", "true");
    let over = null;

    function move(event) {
      if (event.pointerId !== down.pointerId) return;
      if (!ghost.isConnected) document.body.append(ghost);
      chip.classList.add("dragged");
      ghost.style.left = `${event.clientX}px`;
      ghost.style.top = `${event.clientY}px`;
      const slot = document.elementFromPoint(event.clientX, event.clientY)?.closest(".slot") ?? null;
      if (slot !== over) {
        over?.classList.remove("over");
        slot?.classList.add("over");
        over = slot;
      }
    }

    function end(event) {
      if (event.pointerId !== down.pointerId) return;
      window.removeEventListener("pointermove", move);
      window.removeEventListener("pointerup", end);
      window.removeEventListener("pointercancel", end);
      ghost.remove();
      chip.classList.remove("dragged");
      over?.classList.remove("over");
      if (over && event.type === "pointerup") drop(over);
    }

    window.addEventListener("pointermove", move);
    window.addEventListener("pointerup", end);
    window.addEventListener("pointercancel", end);
  });
}
