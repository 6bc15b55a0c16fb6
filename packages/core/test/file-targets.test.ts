import { mkdtemp, open, readdir, readFile, rm, stat, symlink, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { LayeredExtents } from '@varve/qcow2'
import { afterAll, beforeAll, expect, test, vi } from 'vitest'
import { Qcow2FileTarget } from '../src/qcow2-file-target.ts'
import { RawFileTarget } from '../src/raw-file-target.ts'
import { restoreDisk } from '../src/restore-disk.ts'
import type { RestoreTarget } from '../src/restore-target.ts'
import { TargetFile } from '../src/target-file.ts'
import { MemoryStorage } from './memory-storage.ts'
import { type LayerPlan, type StoredChain, storeChain } from './stored-chain.ts'

/** A disk of 64 MiB with data at its beginning and in its middle, and a hole behind it. */
const PLAN: LayerPlan = {
  clusterSize: 65536,
  size: 64 * 1024 * 1024 - 512,
  runs: [
    [2, 3],
    [0, 400],
    [2, 3],
  ],
  seed: 7,
}

const storage = new MemoryStorage()
let stored: StoredChain
let folder = ''
let path = ''

beforeAll(async () => {
  stored = await storeChain(storage, [PLAN])
  folder = await mkdtemp(join(tmpdir(), 'varve-targets-'))
  path = join(folder, 'disk')
})

afterAll(async () => {
  await rm(folder, { recursive: true, force: true })
})

function restore(createTarget: (merged: LayeredExtents) => Promise<RestoreTarget>): Promise<void> {
  return restoreDisk({ storage, chain: stored.chain, disk: 'vda', createTarget })
}

const formats = {
  raw: (options: { path: string; overwrite?: boolean }) => (merged: LayeredExtents) =>
    RawFileTarget.create(options, merged),
  qcow2: (options: { path: string; overwrite?: boolean }) => (merged: LayeredExtents) =>
    Qcow2FileTarget.create(options, merged),
}

test('a disk that no qcow2 image with its clusters can hold is refused, and no file is made', async () => {
  const huge = { size: 2 ** 52, count: 1, start: () => 0, length: () => 2 ** 52, layer: () => -1 }
  const create = Qcow2FileTarget.create({ path }, huge as unknown as LayeredExtents)
  await expect(create).rejects.toMatchObject({
    code: 'TARGET_FAILED',
    message: expect.stringContaining('as raw'),
  })
  expect(await readdir(folder)).toEqual([])
})

test('a raw file holds the disk, with holes where it reads as zeros, and is for its owner alone', async () => {
  await restore(formats.raw({ path }))
  expect((await readFile(path)).equals(stored.reference)).toBe(true)
  const { blocks, mode } = await stat(path)
  expect(blocks * 512).toBeLessThanOrEqual(7 * 65536)
  expect(mode & 0o777).toBe(0o600)
  await rm(path)
})

test('a file that exists is refused and left as it is, unless it may be overwritten', async () => {
  for (const format of [formats.raw, formats.qcow2]) {
    const old = Buffer.alloc(70_000_000, 'old')
    await writeFile(path, old)
    await expect(restore(format({ path }))).rejects.toMatchObject({
      code: 'TARGET_EXISTS',
      context: { path },
    })
    expect((await readFile(path)).equals(old)).toBe(true)
    await restore(format({ path, overwrite: true }))
    expect((await readFile(path)).includes('oldold')).toBe(false)
    await rm(path)
  }
})

test('what is no regular file is refused, also where overwriting is allowed, and is not removed', async () => {
  await symlink('/dev/null', path)
  for (const target of [path, folder])
    await expect(restore(formats.raw({ path: target, overwrite: true }))).rejects.toMatchObject({
      code: 'TARGET_FAILED',
      context: { path: target },
    })
  expect(await readdir(folder)).toStrictEqual(['disk'])
  await rm(path)
})

test('a folder that is not there is an error that names the path', async () => {
  const missing = join(folder, 'none', 'disk')
  await expect(restore(formats.qcow2({ path: missing }))).rejects.toMatchObject({
    code: 'TARGET_FAILED',
    message: expect.stringContaining(missing),
    context: { errno: 'ENOENT' },
  })
})

test('a file system without the room is refused before anything is touched', async () => {
  await writeFile(path, 'old')
  const overwriting = TargetFile.create({ path, overwrite: true }, 2 ** 40, 2 ** 60)
  await expect(overwriting).rejects.toMatchObject({
    code: 'TARGET_FULL',
    context: { path, dataBytes: 2 ** 60 },
  })
  expect(await readFile(path, 'utf8')).toBe('old')
  await rm(path)
})

test('a restore that fails leaves no file', async () => {
  const damaged = new MemoryStorage()
  for (const [key, bytes] of storage.objects) damaged.objects.set(key, Buffer.from(bytes))
  damaged.objects.get(stored.images[0] ?? '')?.fill(0, 600_000, 600_100)
  for (const format of [formats.raw, formats.qcow2]) {
    const restored = restoreDisk({
      storage: damaged,
      chain: stored.chain,
      disk: 'vda',
      createTarget: format({ path }),
    })
    await expect(restored).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
    expect(await readdir(folder)).toStrictEqual([])
  }
})

test('a qcow2 file is no image until it is finished', async () => {
  let header: Buffer | undefined
  await restore(async merged => {
    const target = await formats.qcow2({ path })(merged)
    const finish = target.finish.bind(target)
    target.finish = async () => {
      const file = await open(path)
      header = (await file.read(Buffer.alloc(512), 0, 512, 0)).buffer
      await file.close()
      await finish()
    }
    return target
  })
  expect(header?.equals(Buffer.alloc(512))).toBe(true)
  expect((await readFile(path)).subarray(0, 4).toString('latin1')).toBe('QFI\xfb')
  await rm(path)
})

test('a file is durable and closed when it is finished, and so is its name', async () => {
  for (const format of [formats.raw, formats.qcow2]) {
    const handle = await open(folder)
    const sync = vi.spyOn(Object.getPrototypeOf(handle), 'sync')
    await handle.close()
    let made: RestoreTarget | undefined
    await restore(async merged => {
      made = await format({ path })(merged)
      return made
    })
    expect(sync).toHaveBeenCalledTimes(2)
    await expect(made?.write(0, new Uint8Array(1))).rejects.toThrow('"fd"')
    sync.mockRestore()
    await rm(path)
  }
})
