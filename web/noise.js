/**
 * Unit normal noise from a seed: the numbers of `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.
 *
 * The same as `ldm/diffusion/sampling/numpy_noise.py`, which says where they come from. torch's generator is mt19937
 * (Matsumoto & Nishimura 1998); its normal numbers are made in pairs (Box & Muller 1958), 16 and more in blocks of 16.
 */

const SIZE = 624;
const BLOCK = 16;

export class NormalGenerator {
  /** @param {number | bigint} seed from 0 on; the lower 32 bits count */
  constructor(seed) {
    this.state = new Uint32Array(SIZE);
    this.state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < SIZE; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(1812433253, before) + i;
    }
    this.next = SIZE;
    this.kept = []; // at most one number, for the next call of fewer than 16
  }

  /** Return `count` numbers, as a call of torch.randn does. */
  normal(count) {
    return count >= BLOCK ? this.#blocks(count) : this.#pairs(count);
  }

  /** Return the next number of 32 random bits. */
  word() {
    if (this.next === SIZE) {
      this.#twist();
      this.next = 0;
    }
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  #twist() {
    const { state } = this;
    for (let i = 0; i < SIZE; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % SIZE] & 0x7fffffff);
      state[i] = state[(i + 397) % SIZE] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
  }

  /** Fewer than 16: one pair after the other; the second number of an odd pair is kept. */
  #pairs(count) {
    const found = this.kept.splice(0, count);
    while (found.length < count) {
      const [turn, share] = [this.#share53(), this.#share53()];
      const radius = Math.sqrt(-2 * Math.log1p(-share));
      found.push(radius * Math.cos(2 * Math.PI * turn), radius * Math.sin(2 * Math.PI * turn));
    }
    this.kept.push(...found.splice(count));
    return Float32Array.from(found);
  }

  /** In [0, 1): the lower 53 bits of two words. */
  #share53() {
    const high = this.word() % 2 ** 21;
    return (high * 2 ** 32 + this.word()) * 2 ** -53;
  }

  /** 16 or more: number i of a block with number i + 8; if the last block is not full, the last 16 are made anew. */
  #blocks(count) {
    const numbers = this.#uniform(count);
    for (let start = 0; start + BLOCK <= count; start += BLOCK) boxMuller(numbers.subarray(start, start + BLOCK));
    if (count % BLOCK) {
      numbers.set(this.#uniform(BLOCK), count - BLOCK);
      boxMuller(numbers.subarray(count - BLOCK));
    }
    return numbers;
  }

  /** In [0, 1): the lower 24 bits of each word. */
  #uniform(count) {
    return Float32Array.from({ length: count }, () => (this.word() % 2 ** 24) * 2 ** -24);
  }
}

/** Turn a block of uniform numbers into normal ones, in place. */
function boxMuller(block) {
  for (let i = 0; i < BLOCK / 2; i++) {
    const radius = Math.sqrt(-2 * Math.log(1 - block[i]));
    const angle = 2 * Math.PI * block[i + BLOCK / 2];
    block[i] = radius * Math.cos(angle);
    block[i + BLOCK / 2] = radius * Math.sin(angle);
  }
}
