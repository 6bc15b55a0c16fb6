import { randomBytes } from 'node:crypto'
import { mkdtemp, open, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as turn } from 'node:timers/promises'
import { checkQcow2, createDenseQcow2, createQcow2, qemuIo, scatterQcow2 } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import type { VarveEvent } from '../src/events.ts'
import { ImageReader } from '../src/image-reader.ts'
import { MOST_RUNS, readImageMap } from '../src/read-image-map.ts'

const MiB = 1024 * 1024

let folder: string
let image: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-image-reader-'))
  image = join(folder, 'vda.qcow2')
})
afterEach(() => rm(folder, { recursive: true }))

const qemuImg = (...args: string[]) => execa('qemu-img', args, { cwd: folder })

interface Outcome {
  /** What the reader gave, the whole disk. */
  readonly content: Buffer
  /** What QEMU says that the disk holds. */
  readonly expected: Buffer
  /** Bytes of data, by 4 KiB, that the server was asked for. */
  readonly served: number
  readonly warnings: string[]
}

interface Circumstances {
  /** Changes what the server gives. */
  change?: (served: Buffer) => void
  /** The most runs that are to be read from the file. */
  mostRuns?: number
}

/** Reads a whole disk in pieces that fit no cluster, beside QEMU's own conversion, which also stands in for the server. */
async function readDisk(
  format: 'qcow2' | 'raw',
  { change, ...limits }: Circumstances = {},
): Promise<Outcome> {
  const raw = join(folder, 'expected.raw')
  await qemuImg('convert', '-f', format, '-O', 'raw', image, raw)
  const expected = await readFile(raw)
  const given = Buffer.from(expected)
  change?.(given)
  const warnings: string[] = []
  const asked = new Set<number>()
  using reader = await ImageReader.open({
    disk: 'vda',
    path: image,
    format,
    size: expected.length,
    ...limits,
    server: {
      async read(offset, into) {
        into.set(given.subarray(offset, offset + into.length))
        const end = offset + into.length
        for (let at = offset; at < end; at = (Math.floor(at / 4096) + 1) * 4096) {
          const page = given.subarray(at, Math.min(end, (Math.floor(at / 4096) + 1) * 4096))
          if (page.some(byte => byte !== 0)) asked.add(Math.floor(at / 4096))
        }
      },
    },
    onEvent: (event: VarveEvent) => event.type === 'warning' && warnings.push(event.message),
  })
  asked.clear() // of the samples
  const content = Buffer.alloc(expected.length, 0xee)
  const reads: Promise<void>[] = []
  for (let at = 0; at < content.length; at += 100_000)
    reads.push(reader.read(at, content.subarray(at, at + 100_000)))
  await Promise.all(reads)
  return { content, expected, served: asked.size * 4096, warnings }
}

async function expectSame(outcome: Outcome, served: number): Promise<void> {
  expect(outcome.warnings).toEqual([])
  expect(outcome.content.equals(outcome.expected)).toBe(true)
  expect(outcome.expected.some(byte => byte !== 0)).toBe(true)
  expect(outcome.served).toBe(served)
}

test('data comes from the file, and never what a zeroed or discarded cluster still has there', async () => {
  await createQcow2(image, 16 * MiB)
  await qemuIo(image, 'qcow2', [
    'write -P 1 0 3M',
    'write -P 2 9M 1M',
    'write -P 3 5M 64k',
    'write -z 1M 128k', // keeps its clusters in the file
    'discard 2M 512k',
    'write -P 4 2200k 3k',
  ])
  await expectSame(await readDisk('qcow2'), 0)
})

test('clusters of any size are found', async () => {
  for (const size of ['512', '4k', '2M']) {
    await rm(image, { force: true })
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `cluster_size=${size}`, image, '8M')
    await qemuIo(image, 'qcow2', ['write -P 1 4M 700k', 'write -P 2 100k 300k', 'write -z 4200k 64k'])
    await expectSame(await readDisk('qcow2'), 0)
  }
})

test('a part of a cluster that is nothing is not read from its place in the file', async () => {
  await qemuImg('create', '-q', '-f', 'qcow2', '-o', 'extended_l2=on,cluster_size=128k', image, '8M')
  await qemuIo(image, 'qcow2', ['write -P 1 0 1M', 'write -z 64k 8k', 'write -P 2 4M 12k', 'discard 512k 4k'])
  await expectSame(await readDisk('qcow2'), 0)
})

test('what is compressed is left to the server', async () => {
  await createQcow2(image, 8 * MiB)
  await qemuIo(image, 'qcow2', ['write -P 1 0 1M', 'write -c -P 2 2M 64k', 'write -P 3 3M 64k'])
  await expectSame(await readDisk('qcow2'), 65_536)
})

test('what is in a backing file is left to the server', async () => {
  await createQcow2(join(folder, 'base.qcow2'), 8 * MiB)
  await qemuIo(join(folder, 'base.qcow2'), 'qcow2', ['write -P 1 0 1M'])
  await qemuImg('create', '-q', '-f', 'qcow2', '-b', 'base.qcow2', '-F', 'qcow2', image)
  await qemuIo(image, 'qcow2', ['write -P 2 512k 1M'])
  await expectSame(await readDisk('qcow2'), 512 * 1024)
})

test('what is in an external data file is left to the server', async () => {
  await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${join(folder, 'vda.data')}`, image, '8M')
  await qemuIo(image, 'qcow2', ['write -P 1 0 1M'])
  await truncate(image, 8 * MiB) // so that the data's offsets are also within this file
  await expectSame(await readDisk('qcow2'), MiB)
})

test('an image that has internal snapshots gives what is in it now', async () => {
  await createQcow2(image, 8 * MiB)
  await qemuIo(image, 'qcow2', ['write -P 1 0 2M'])
  await qemuImg('snapshot', '-c', 'before', image)
  await qemuIo(image, 'qcow2', ['write -P 2 1M 512k', 'discard 0 64k'])
  await expectSame(await readDisk('qcow2'), 0)
})

test('an image of version 2 is read as one of version 3', async () => {
  await qemuImg('create', '-q', '-f', 'qcow2', '-o', 'compat=0.10', image, '8M')
  await qemuIo(image, 'qcow2', ['write -P 1 1M 1M'])
  await expectSame(await readDisk('qcow2'), 0)
})

test('an image whose file ends inside a cluster reads as QEMU reads it', async () => {
  await createQcow2(image, 8 * MiB)
  await qemuIo(image, 'qcow2', ['write -P 1 0 100k'])
  const { size } = JSON.parse((await execa('stat', ['--printf={"size":%s}', image])).stdout)
  await truncate(image, Math.floor(size / 65_536) * 65_536 - 10_000)
  await expectSame(await readDisk('qcow2'), 0)
})

test('a raw disk is its file, up to the last byte', async () => {
  await writeFile(image, Buffer.alloc(3 * MiB + 700, 7))
  await expectSame(await readDisk('raw'), 0)
})

test('a file that the map does not fit is not trusted, and the server gives everything', async () => {
  await createQcow2(image, 8 * MiB)
  await qemuIo(image, 'qcow2', ['write -P 1 0 1M', 'write -P 2 4M 1M'])
  const change = (served: Buffer) => {
    served[4 * MiB] = 9
    served[MiB - 1] = 9
  }
  const outcome = await readDisk('qcow2', { change })
  expect(outcome.warnings).toEqual([expect.stringMatching(/vda .*qemu-nbd alone.*other bytes at 4194304/)])
  expect(outcome.served).toBe(2 * MiB)
  expect([outcome.content[4 * MiB], outcome.content[MiB - 1]]).toEqual([9, 9])
})

/** Its clusters have 512 bytes, and each is a run of its own. */
async function createScattered(size: number): Promise<void> {
  const raw = join(folder, 'data.raw')
  await writeFile(raw, randomBytes(size))
  await qemuImg('convert', '-f', 'raw', '-O', 'qcow2', '-o', 'cluster_size=512', raw, image)
  await scatterQcow2(image)
  await checkQcow2(image)
}

test('of a scattered image the first runs come from the file, and the others from the server', async () => {
  await createScattered(4 * MiB)
  await expectSame(await readDisk('qcow2'), 0)
  await expectSame(await readDisk('qcow2', { mostRuns: 1000 }), 4 * MiB - 1000 * 512)
  await expectSame(await readDisk('qcow2', { mostRuns: 8192 }), 0) // just as many as there are
})

test('the map of an image of any size, however scattered, has so many runs and no more', async () => {
  await createDenseQcow2(image, 20 * 1024 * MiB)
  await using file = await open(image)
  const map = await readImageMap(file, image, {})
  expect(map.count).toBe(MOST_RUNS)
  const last = map.run(MOST_RUNS - 1)
  const { stdout } = await qemuImg('map', '--output=json', image)
  const entries: { start: number; length: number; offset: number }[] = JSON.parse(stdout)
  expect(entries.length).toBeGreaterThan(300_000)
  for (const entry of [entries[0], entries[12_345], entries[MOST_RUNS - 1]])
    expect(map.at(entry?.start ?? 0)).toEqual({ fileOffset: entry?.offset, length: entry?.length })
  expect(map.at(last.start + last.length)).toEqual({
    fileOffset: undefined,
    length: Number.POSITIVE_INFINITY,
  })
})

test('a map that is given up ends as such, and not as one that is full', async () => {
  await createDenseQcow2(image, 1024 * MiB)
  await using file = await open(image)
  const given = new AbortController()
  const reading = readImageMap(file, image, { signal: given.signal })
  given.abort(new Error('enough'))
  await expect(reading).rejects.toMatchObject({ code: 'ABORTED' })
})

test('a read with many parts has only a few of them under way at a time', async () => {
  await createQcow2(image, 8 * MiB)
  await qemuIo(
    image,
    'qcow2',
    Array.from({ length: 64 }, (_, index) => `write -P 1 ${index * 128}k 64k`),
  )
  let [under, most, all] = [0, 0, 0]
  const read = async (_offset: number, into: Uint8Array) => {
    most = Math.max(most, ++under)
    await turn()
    into.fill(1)
    under--
    all++
  }
  const options = { disk: 'vda', path: image, format: 'qcow2', size: 8 * MiB, server: { read } } as const
  using reader = await ImageReader.open(options)
  all = most = 0 // of the samples
  await reader.read(0, Buffer.alloc(8 * MiB))
  expect(all).toBe(64)
  expect(most).toBeLessThan(5)
})

test('a file that cannot be opened is told as a warning, and the server gives everything', async () => {
  const warnings: string[] = []
  using reader = await ImageReader.open({
    disk: 'vda',
    path: join(folder, 'none'),
    format: 'qcow2',
    size: MiB,
    server: { read: async (_offset, into) => void into.fill(5) },
    onEvent: event => event.type === 'warning' && warnings.push(event.message),
  })
  const content = Buffer.alloc(MiB)
  await reader.read(0, content)
  expect(content.equals(Buffer.alloc(MiB, 5))).toBe(true)
  expect(warnings).toEqual([expect.stringMatching(/vda .*ENOENT/)])
})
