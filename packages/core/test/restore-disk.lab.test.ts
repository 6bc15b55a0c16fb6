import { createHash } from 'node:crypto'
import { mkdtemp, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { NbdClient } from '@varve/nbd'
import type { LayeredExtents } from '@varve/qcow2'
import { fuzz } from '@varve/testkit'
import { execa } from 'execa'
import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { NbdTarget } from '../src/nbd-target.ts'
import { Qcow2FileTarget } from '../src/qcow2-file-target.ts'
import { exportDisk } from '../src/qemu-nbd.ts'
import { RawFileTarget } from '../src/raw-file-target.ts'
import { restoreDisk } from '../src/restore-disk.ts'
import type { RestoreTarget } from '../src/restore-target.ts'
import { MemoryStorage } from './memory-storage.ts'
import { fillPattern, type LayerPlan, layerPlans, type StoredChain, storeChain } from './stored-chain.ts'

let folder = ''

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-restore-'))
})

afterEach(async () => {
  await rm(folder, { recursive: true, force: true })
})

interface Backups extends StoredChain {
  storage: MemoryStorage
  /** The reference as a raw file. */
  raw: string
}

async function backUp(plans: readonly LayerPlan[]): Promise<Backups> {
  const storage = new MemoryStorage()
  const stored = await storeChain(storage, plans)
  const raw = join(folder, 'reference.raw')
  await writeFile(raw, stored.reference)
  return { storage, raw, ...stored }
}

function restore(
  { storage, chain }: Backups,
  createTarget: (merged: LayeredExtents) => Promise<RestoreTarget>,
): Promise<void> {
  return restoreDisk({ storage, chain, disk: 'vda', createTarget })
}

/** Fails unless qemu-img finds both disks the same, what lies behind the shorter one being zeros. */
async function compare(raw: string, path: string, format: 'qcow2' | 'raw'): Promise<void> {
  await execa('qemu-img', ['compare', '-f', 'raw', '-F', format, raw, path])
}

async function sha256(path: string): Promise<string> {
  return createHash('sha256')
    .update(await readFile(path))
    .digest('hex')
}

describe('a restore to a new file', () => {
  test('is to qemu-img the reference disk, whatever the chain and the cluster size', async () => {
    await fc.assert(
      fc.asyncProperty(layerPlans(), fc.integer({ min: 12, max: 21 }), async (plans, bits) => {
        const backups = await backUp(plans)
        const qcow2 = join(folder, 'restored.qcow2')
        const raw = join(folder, 'restored.raw')
        await restore(backups, merged =>
          Qcow2FileTarget.create({ path: qcow2, clusterSize: 2 ** bits }, merged),
        )
        await restore(backups, merged => RawFileTarget.create({ path: raw }, merged))
        await execa('qemu-img', ['check', '-f', 'qcow2', qcow2]) // leaks fail it as well
        await compare(backups.raw, qcow2, 'qcow2')
        expect(await sha256(raw)).toBe(await sha256(backups.raw))
        const { stdout } = await execa('qemu-img', ['info', '--output', 'json', '-f', 'qcow2', qcow2])
        const info = JSON.parse(stdout)
        expect(info).toMatchObject({ 'virtual-size': backups.reference.length, 'cluster-size': 2 ** bits })
        expect(info).not.toHaveProperty('backing-filename')
        await Promise.all([rm(qcow2), rm(raw)])
      }),
      fuzz(6),
    )
  })

  test('that runs out of space on the way is TARGET_FULL and leaves nothing', async () => {
    const backups = await backUp([{ clusterSize: 65536, size: 8 << 20, runs: [[2, 128]], seed: 1 }])
    const small = join(folder, 'small')
    await execa('mkdir', [small])
    await execa('mount', ['-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', small])
    try {
      for (const path of [join(small, 'vda.qcow2'), join(small, 'vda.raw')]) {
        const filler = join(small, 'filler')
        const restored = restore(backups, async merged => {
          const target = path.endsWith('raw')
            ? await RawFileTarget.create({ path }, merged)
            : await Qcow2FileTarget.create({ path }, merged)
          await writeFile(filler, Buffer.alloc(6 << 20))
          return target
        })
        await expect(restored).rejects.toMatchObject({ code: 'TARGET_FULL', context: { path } })
        expect(await readdir(small)).toStrictEqual(['filler'])
        await rm(filler)
      }
    } finally {
      await execa('umount', [small])
    }
  })
})

/** A chain with data, zeros and holes, of a disk whose last sectors are data. */
const CHAIN: LayerPlan[] = [
  { clusterSize: 65536, size: (4 << 20) + 1536, runs: [[2, 65]], seed: 1 },
  { clusterSize: 4096, size: (4 << 20) + 1536, runs: [[0, 100], [1, 300], [2, 20], [0, 500], [2, 105]], seed: 2 }, // biome-ignore format: one line
]

/** An image full of what must not be there afterwards. */
async function oldTarget(format: 'qcow2' | 'raw', size: number): Promise<string> {
  const old = Buffer.alloc(size)
  fillPattern(old, 99)
  const raw = join(folder, 'old.raw')
  const path = join(folder, `old.${format}`)
  await writeFile(raw, old)
  if (format === 'qcow2') await execa('qemu-img', ['convert', '-f', 'raw', '-O', format, raw, path])
  return path
}

async function restoreOver(backups: Backups, path: string, format: 'qcow2' | 'raw'): Promise<void> {
  await using server = await exportDisk({ disk: 'vda', path, format, writable: true, folder })
  await using client = await NbdClient.connect({ socketPath: server.socketPath })
  await restore(backups, async merged => new NbdTarget(client, merged, { path }))
}

describe('a restore in place over qemu-nbd', () => {
  for (const format of ['qcow2', 'raw'] as const) {
    for (const [what, more] of [
      ['the same size', 0],
      ['a larger size', 3 << 20],
    ] as const) {
      test(`to a ${format} image of ${what} leaves the backup's disk, and zeros behind it`, async () => {
        const backups = await backUp(CHAIN)
        const path = await oldTarget(format, backups.reference.length + more)
        await restoreOver(backups, path, format)
        await compare(backups.raw, path, format)
        if (format === 'qcow2') await execa('qemu-img', ['check', '-f', 'qcow2', path])
        else expect((await stat(path)).size).toBe(backups.reference.length + more)
      })
    }

    test(`to a ${format} image that is too small is refused before a byte is touched`, async () => {
      const backups = await backUp(CHAIN)
      const path = await oldTarget(format, backups.reference.length - 512)
      const before = await sha256(path)
      await expect(restoreOver(backups, path, format)).rejects.toMatchObject({
        code: 'TARGET_TOO_SMALL',
        context: { path, size: backups.reference.length - 512, needed: backups.reference.length },
      })
      expect(await sha256(path)).toBe(before)
    })
  }

  test('of random chains leaves the reference disk', async () => {
    await fc.assert(
      fc.asyncProperty(layerPlans(5), fc.nat(100), async (plans, more) => {
        const backups = await backUp(plans)
        const path = await oldTarget('qcow2', backups.reference.length + more * 512)
        await restoreOver(backups, path, 'qcow2')
        await compare(backups.raw, path, 'qcow2')
      }),
      fuzz(5),
    )
  })
})

/** Serves `path` by nbdkit with a filter, while `use` runs. */
async function withNbdkit<T>(
  path: string,
  filter: string,
  parameters: string[],
  use: (client: NbdClient) => Promise<T>,
): Promise<T> {
  const socketPath = join(folder, 'nbdkit.sock')
  const pidFile = join(folder, 'nbdkit.pid')
  // It returns when it listens.
  await execa(
    'nbdkit',
    ['-U', socketPath, '-P', pidFile, `--filter=${filter}`, 'file', path, ...parameters],
    {
      stdio: 'ignore',
    },
  )
  try {
    await using client = await NbdClient.connect({ socketPath })
    return await use(client)
  } finally {
    process.kill(Number(await readFile(pidFile, 'utf8')), 'SIGTERM')
    await Promise.all([rm(socketPath, { force: true }), rm(pidFile, { force: true })])
  }
}

describe('a restore in place over a server with limits', () => {
  const [full, above] = CHAIN
  const block = ['blocksize-minimum=4096', 'blocksize-preferred=4096', 'blocksize-maximum=32M']
  const strict = [...block, 'blocksize-error-policy=error']

  for (const [what, kind] of [
    ['data', 2],
    ['zeros', 1],
  ] as const) {
    // biome-ignore format: one line
    test(`that takes whole blocks only fills up the last one, where the disk ends with ${what} inside it`, async () => {
      if (!full || !above) throw new Error('no chain')
      const backups = await backUp([full, { ...above, runs: [...above.runs.slice(0, -1), [kind, 105]] }])
      const path = await oldTarget('raw', 6 << 20)
      await withNbdkit(path, 'blocksize-policy', strict, async client => {
        expect(client.blockSize.minimum).toBe(4096)
        await restore(backups, async merged => new NbdTarget(client, merged, { path }))
      })
      await compare(backups.raw, path, 'raw')
    })
  }

  test('that takes only blocks larger than a cluster is refused before a byte is touched', async () => {
    const backups = await backUp(CHAIN)
    const path = await oldTarget('raw', 6 << 20)
    const before = await sha256(path)
    const large = ['blocksize-minimum=64K', 'blocksize-preferred=64K', 'blocksize-maximum=32M']
    await withNbdkit(path, 'blocksize-policy', large, async client => {
      const restored = restore(backups, async merged => new NbdTarget(client, merged, { path }))
      await expect(restored).rejects.toMatchObject({
        code: 'TARGET_FAILED',
        message: expect.stringContaining('65536 bytes'),
        context: { path },
      })
    })
    expect(await sha256(path)).toBe(before)
  })

  test('that has no space left is TARGET_FULL, and one that fails otherwise TARGET_FAILED', async () => {
    const backups = await backUp(CHAIN)
    const path = await oldTarget('raw', 6 << 20)
    for (const [error, code] of [
      ['ENOSPC', 'TARGET_FULL'],
      ['EIO', 'TARGET_FAILED'],
    ] as const) {
      const failing = [`error=${error}`, 'error-pwrite-rate=20%']
      await withNbdkit(path, 'error', failing, async client => {
        const restored = restore(backups, async merged => new NbdTarget(client, merged, { path }))
        await expect(restored).rejects.toMatchObject({ code, context: { path, errno: error } })
      })
    }
  })
})
