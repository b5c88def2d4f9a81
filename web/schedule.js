/**
 * The noise levels that a model was trained on, and those that a run of sampling visits: `ldm/diffusion/schedule.py`.
 *
 * A noisy image is x = x0 + sigma noise. The network knows noise levels as timesteps t, from 0 to T - 1.
 */

const MIN_ALPHA_BAR = 2 ** -24; // in place of 0, so that sigma is finite
const SPACINGS = ["trailing", "leading", "linspace", "karras", "exponential"];

export class Schedule {
  /** @param {number[]} alphasCumprod the share of the signal in the variance at each timestep, descending */
  constructor(alphasCumprod) {
    const shares = [...alphasCumprod];
    const last = shares.length - 1;
    if (shares[last] === 0) shares[last] = last ? Math.min(MIN_ALPHA_BAR, shares[last - 1] / 2) : MIN_ALPHA_BAR;
    this.sigmas = shares.map((share) => Math.sqrt((1 - share) / share));
    this.logs = this.sigmas.map((sigma) => Math.log1p(sigma * sigma));
  }

  get T() {
    return this.sigmas.length;
  }

  /** Return sigma at a timestep, which may be fractional. */
  sigmaAt(t) {
    if (!(t >= 0 && t <= this.T - 1)) throw new Error(`timestep ${t} is outside 0..${this.T - 1}`);
    const below = Math.floor(t);
    if (below === t) return this.sigmas[t];
    return Math.sqrt(Math.expm1(this.logs[below] + (t - below) * (this.logs[below + 1] - this.logs[below])));
  }

  /** Return the fractional timestep of sigma, clamped to 0..T - 1. */
  tAt(sigma) {
    const log = Math.log1p(sigma * sigma);
    if (log <= this.logs[0]) return 0;
    if (log >= this.logs[this.T - 1]) return this.T - 1;
    const above = this.logs.findIndex((value) => value > log);
    const t = above - 1 + (log - this.logs[above - 1]) / (this.logs[above] - this.logs[above - 1]);
    return Math.abs(t - Math.round(t)) < 1e-6 ? Math.round(t) : t;
  }
}

/** Return the sigmas at which the network is evaluated, descending, then the final one. */
export function samplingSigmas(schedule, steps, spacing = "trailing", finalSigma = "zero") {
  let sigmas;
  if (["karras", "exponential"].includes(spacing)) sigmas = ramp(spacing, steps, schedule);
  else if (SPACINGS.includes(spacing)) sigmas = timesteps(spacing, steps, schedule.T).map((t) => schedule.sigmas[t]);
  else sigmas = listed(spacing, schedule);
  if (sigmas.length !== steps) throw new Error(`the spacing lists ${sigmas.length} noise levels, not ${steps}`);
  return [...sigmas, finalSigma === "sigma_min" ? schedule.sigmas[0] : 0];
}

/** Choose `steps` of T timesteps, descending. */
export function timesteps(spacing, steps, T) {
  if (!(steps >= 1 && steps <= T)) throw new Error(`the number of steps must be from 1 to ${T}, got ${steps}`);
  const grid = Array.from({ length: steps }, (_, i) => {
    if (spacing === "leading") return i * Math.floor(T / steps) + 1;
    if (spacing === "linspace") return steps > 1 ? round((i * (T - 1)) / (steps - 1)) : T - 1;
    return round(T + (steps - 1 - i) * (-T / steps)) - 1; // trailing
  });
  let lowest = 0;
  grid.forEach((t, i) => {
    grid[i] = Math.min(Math.max(t, lowest), T - steps + i);
    lowest = grid[i] + 1;
  });
  return grid.reverse();
}

function ramp(spacing, steps, schedule) {
  const [low, high] = [schedule.sigmas[0], schedule.sigmas[schedule.T - 1]];
  return Array.from({ length: steps }, (_, i) => {
    const share = steps > 1 ? i / (steps - 1) : 0;
    if (spacing === "exponential") return Math.exp(Math.log(high) + share * (Math.log(low) - Math.log(high)));
    return (high ** (1 / 7) + share * (low ** (1 / 7) - high ** (1 / 7))) ** 7;
  }).map((sigma) => Math.min(Math.max(sigma, low), high));
}

/** Read a list of timesteps ("999,749,499"), or of noise levels after the word "sigmas". */
function listed(text, schedule) {
  const words = String(text).split(/[\s,]+/).filter(Boolean);
  const areSigmas = words[0] === "sigmas";
  const numbers = words.slice(areSigmas ? 1 : 0).map(Number);
  if (!numbers.length || numbers.some(Number.isNaN))
    throw new Error(`unknown spacing "${text}"; choose from ${SPACINGS.join(", ")}, or list timesteps`);
  return areSigmas ? numbers : numbers.map((t) => schedule.sigmaAt(t));
}

/** Round halves to the even number, as Python does. */
function round(x) {
  return Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}
