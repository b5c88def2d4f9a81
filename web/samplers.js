/**
 * Samplers: functions that make one denoising step, and the loop over noise levels. As `ldm/diffusion/sampling`.
 *
 * x = x0 + sigma noise is moved along decreasing noise levels. Every step evaluates denoise(x, sigma), the model's
 * prediction of the clean image, and moves x a little towards it. Arrays are Float32Array of one image.
 */

export const SAMPLERS = {
  ddim: { step: euler, eta: 0 },
  ddpm: { step: euler, eta: 1 },
  euler_a: { step: euler, eta: 1 },
  dpmpp_2m: { step: dpmpp2m, eta: 0 },
};

/**
 * Yield {index, now, sigma, x} after each step: what the network saw and predicted, now = {sigma, x, x0}, and what the
 * step reached, x at noise level `sigma`.
 *
 * @param {(x: Float32Array, sigma: number) => Promise<Float32Array>} denoise predicts x0
 * @param {Float32Array} x at noise level sigmas[0]
 * @param {number[]} sigmas descending
 * @param {string} sampler a key of SAMPLERS
 * @param {() => Float32Array} noise unit normal numbers, as many as x has
 */
export async function* sample(denoise, x, sigmas, sampler, noise) {
  if (!Object.hasOwn(SAMPLERS, sampler))
    throw new Error(`unknown sampler "${sampler}"; choose from ${Object.keys(SAMPLERS).join(", ")}`);
  const { step, eta } = SAMPLERS[sampler];
  let last = null;
  for (let index = 0; index + 1 < sigmas.length; index++) {
    const [sigma, next] = [sigmas[index], sigmas[index + 1]];
    const now = { sigma, x, x0: await denoise(x, sigma) };
    if (next < sigma) x = step(now, last, next, eta, noise);
    last = now;
    yield { index, now, sigma: next, x };
  }
}

/** Euler's step to sigma, which is DDIM: x0 + (sigma / now.sigma) (x - x0). */
function eulerTo(now, sigma) {
  const ratio = sigma / now.sigma;
  return now.x.map((x, i) => now.x0[i] + ratio * (x - now.x0[i]));
}

/** Return [down, up]: step down to `down`, then add noise of deviation `up` (Song et al. 2021, eq. 16). */
function ancestralSplit(sigma, next, eta) {
  const ratio = next / sigma;
  return [next * Math.hypot(Math.sqrt(1 - eta * eta), eta * ratio), eta * next * Math.sqrt((1 - ratio) * (1 + ratio))];
}

function addNoise(x, up, noise) {
  if (up === 0) return x;
  const fresh = noise();
  return x.map((value, i) => value + up * fresh[i]);
}

/** DDIM (eta 0); Euler ancestral, which is DDPM with the small variance (eta 1). */
function euler(now, last, next, eta, noise) {
  const [down, up] = ancestralSplit(now.sigma, next, eta);
  return addNoise(eulerTo(now, down), up, noise);
}

/** DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): Euler's step, corrected by the last prediction. */
function dpmpp2m(now, last, next) {
  const x = eulerTo(now, next);
  if (last === null || next === 0) return x;
  const h = Math.log(now.sigma / next);
  const node = Math.log(now.sigma / last.sigma) / h; // of the last prediction, where now is 0 and the next level 1
  const weight = -Math.expm1(-h) / 2 / node;
  return x.map((value, i) => value + weight * (last.x0[i] - now.x0[i]));
}
