import { createInterface } from 'node:readline'
import { buffer } from 'node:stream/consumers'
import { ExtentKind, type RbdDiff } from '@varve/core'
import { execa } from 'execa'
import { expect } from 'vitest'
import type { RbdSite } from './rbd-site.ts'
import { applyDiff } from './stream-model.ts'

const KIB = 1024
const MIB = 1024 * KIB
/** Small objects: the edges of many are met with little data. */
export const OBJECT = 64 * KIB
export const SMALL_OBJECTS = ['--object-size', '64K']

/** What an image held at a snapshot. */
export interface Known {
  readonly name: string | undefined
  readonly bytes: Buffer
}

/** What a full stream begins from. */
export const NOTHING: Known = { name: undefined, bytes: Buffer.alloc(0) }

/** A kind of images: its name, and the options of `rbd create` that make one. */
export type ImageKind = [name: string, options: string[]]

/** The runs of one kind. */
export function runs({ extents }: RbdDiff, kind: ExtentKind): [start: number, length: number][] {
  return Array.from({ length: extents.count }, (_, i) => i)
    .filter(i => extents.kind(i) === kind)
    .map(i => [extents.start(i), extents.length(i)])
}

/** Exports of the images of a site, and what they are checked with, which is the same for several kinds of images. */
export class Exports {
  readonly #site: RbdSite

  constructor(site: RbdSite) {
    this.#site = site
  }

  /** A stream, and what it holds. */
  async exported(image: string, snapshot: string, from?: string) {
    const what = { snapshot, ...(from !== undefined && { from }) }
    const { stream, diff } = this.#site.cluster.exportDiff(image, what)
    return { bytes: await buffer(stream), diff: diff() }
  }

  /** Takes a snapshot and checks the streams that lead to it, by Ceph's own library. Returns what it holds. */
  async checkedSnapshot(
    image: string,
    snapshot: string,
    parents: readonly Known[] = [NOTHING],
  ): Promise<Known> {
    await this.#site.ceph.client.createSnapshot(image, snapshot)
    const truth = await this.#site.bytes(`${image}@${snapshot}`)
    for (const { name, bytes } of parents) {
      const stream = await this.exported(image, snapshot, name)
      const applied = applyDiff(stream.diff, stream.bytes, bytes)
      expect(applied.equals(truth), `${name ?? 'nothing'} to ${snapshot}`).toBe(true)
    }
    return { name: snapshot, bytes: truth }
  }

  /** An increment tells what was written, and trimmed and zeroed ranges as zeros. */
  async checkIncrement([, options]: ImageKind): Promise<void> {
    const site = this.#site
    const image = await site.create(16 * MIB, ...options)
    await site.write(image, 'write -P 1 0 16M')
    const one = await this.checkedSnapshot(image, 'one')
    await site.write(
      image,
      'write -P 2 64k 4k',
      'discard 1M 512k',
      'discard 4M 4M',
      'write -z 9M 64k',
      'write -z -u 10M 64k',
      'write -P 0 11M 64k',
      'discard 15M 1M',
    )
    await this.checkedSnapshot(image, 'two', [one])
    const { diff } = await this.exported(image, 'two', 'one')
    expect(runs(diff, ExtentKind.data)).toEqual([[64 * KIB, 4 * KIB]])
    expect(runs(diff, ExtentKind.zero)).toEqual([
      [MIB, 512 * KIB],
      [4 * MIB, 4 * MIB],
      [9 * MIB, 64 * KIB],
      [10 * MIB, 64 * KIB],
      [11 * MIB, 64 * KIB],
      [15 * MIB, MIB],
    ])
    await site.ceph.client.createSnapshot(image, 'three')
    const unchanged = await this.exported(image, 'three', 'two')
    expect(unchanged.diff.extents.count).toBe(1)
    expect(unchanged.bytes.length).toBeLessThan(100)
  }

  /** Streams of random changes, of the size too, lead to what the image holds. */
  async checkRandomChanges([name, options]: ImageKind): Promise<void> {
    const site = this.#site
    if (options.includes('data')) await site.ceph.createRbdPool('data')
    const random = randomNumbers(0x5eed + name.length)
    let size = 16 * OBJECT
    const image = await site.create(size, ...options)
    const known = [NOTHING]
    for (let step = 0; step < 3; step++) {
      const changes = Array.from({ length: 10 }, () => {
        const kind = ['write -P 0', `write -P ${1 + random(255)}`, 'write -z', 'write -z -u', 'discard'][
          random(5)
        ]
        const length = Math.min(size, [512, 4096, OBJECT / 2, OBJECT, 3 * OBJECT][random(5)] ?? 0)
        const start = random((size - length) / 512 + 1) * 512
        return `${kind} ${start} ${length}`
      })
      await site.write(image, ...changes)
      if (step > 0) {
        size = [5 * OBJECT + 512, 9 * OBJECT, 16 * OBJECT, 20 * OBJECT + 4096][random(4)] ?? size
        await site.ceph.client.resize(image, size)
      }
      known.push(await this.checkedSnapshot(image, `s${step}`, known.slice(-2)))
    }
  }

  /** A snapshot under writes of QEMU has all that was flushed and nothing that came after. */
  async checkUnderWrites([, options]: ImageKind): Promise<void> {
    const { ceph, cluster } = this.#site
    const image = await this.#site.create(4 * MIB, ...options)
    const path = `rbd:${image}:conf=${ceph.conf}`
    const writer = execa('qemu-io', ['-t', 'writeback', '-f', 'raw', path], { stdin: 'pipe' })
    const answers = createInterface(writer.stdout)[Symbol.asyncIterator]()
    let flushed = 0
    const begun = Promise.withResolvers<void>()
    let isTaken = false
    const writeAll = async () => {
      for (let i = 0; !isTaken && (i + 1) * 512 <= 4 * MIB; i++) {
        writer.stdin.write(`write -P ${1 + (i % 255)} ${i * 512} 512\nflush\n`)
        while (!(await answers.next()).value?.includes('wrote')) {
          // the prompts, and how fast the last one was
        }
        flushed = i // this write's answer comes after the flush before it
        if (flushed > 0) begun.resolve()
      }
      writer.stdin.end()
      await writer
    }
    const taken: { name: string; atLeast: number; atMost: number }[] = []
    const takeSnapshots = async () => {
      await begun.promise
      for (const name of ['one', 'two']) {
        const atLeast = flushed
        await cluster.createSnapshot(image, name)
        taken.push({ name, atLeast, atMost: flushed + 2 })
      }
      isTaken = true
    }
    await Promise.all([writeAll(), takeSnapshots()])
    expect(taken.at(-1)?.atLeast).toBeGreaterThan(0)
    for (const { name, atLeast, atMost } of taken) {
      const bytes = await this.#site.bytes(`${image}@${name}`)
      let there = 0
      while (bytes[there * 512] === 1 + (there % 255)) there++
      expect(there).toBeGreaterThanOrEqual(atLeast)
      expect(there).toBeLessThanOrEqual(atMost)
      expect(bytes.subarray(there * 512).every(byte => byte === 0)).toBe(true)
    }
  }
}

/** Random numbers of 32 bits that are the same each time (xorshift32). */
function randomNumbers(seed: number): (below: number) => number {
  let state = seed
  return below => {
    state ^= state << 13
    state ^= state >>> 17
    state ^= state << 5
    return (state >>> 0) % below
  }
}
