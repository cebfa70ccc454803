// Ranks as the page holds them: chosen[i] is a number, null for "not ranked", or undefined where nobody has chosen yet.

export const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

// Where one response is left and one rank, the response has that rank until somebody says otherwise.
export function completeRanks(chosen) {
  const ranks = chosen.map((rank) => rank ?? null);
  const open = chosen.flatMap((rank, i) => (rank === undefined ? [i] : []));
  const taken = new Set(ranks.filter((rank) => rank !== null));
  if (open.length === 1 && taken.size === chosen.length - 1) {
    ranks[open[0]] = chosen.map((_, i) => i + 1).find((rank) => !taken.has(rank));
  }
  return ranks;
}

export function nextOpen(chosen, from) {
  for (let step = 1; step <= chosen.length; step += 1) {
    const i = (from + step) % chosen.length;
    if (chosen[i] === undefined) return i;
  }
  return from;
}

export function describe(ranks) {
  return ranks.map((rank, i) => `${LETTERS[i]} ${rank === null ? "not ranked" : rank}`).join(", ");
}
