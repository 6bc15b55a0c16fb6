import { ExtentKind, ExtentList, planImage } from '@varve/qcow2'
import fc from 'fast-check'
import { beforeEach, describe, expect, it, vi } from 'vitest'
import type { StoredBackup } from '../src/backups.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { BlockDigester, blake3Hex } from '../src/digest.ts'
import { VarveError } from '../src/errors.ts'
import { type BackupManifest, type Qcow2ManifestDisk, serializeManifest } from '../src/manifest.ts'
import { bytesBody } from '../src/storage.ts'
import type { VerifyProgress } from '../src/verify-chain.ts'
import type { MemoryStorageOptions } from './memory-storage.ts'
import { noRejectionUnhandled } from './no-rejection-unhandled.ts'
import { layerId, storeChain } from './stored-chain.ts'
import { WatchedStorage } from './watched-storage.ts'

const BLOCK = 64 * 1024
const { unallocated, zero, data } = ExtentKind
const NEWEST = layerId(2)

let storage: WatchedStorage
let chains: ChainManager
/** A full backup and two increments of real images, with a definition each. */
let chain: StoredBackup[]

beforeEach(async () => {
  storage = new WatchedStorage()
  chains = new ChainManager({ storage })
  const layer = { clusterSize: 16_384, size: 1024 * 1024 }
  const stored = await storeChain(storage, [
    { ...layer, seed: 1, runs: [[data, 40]] },
    {
      ...layer,
      seed: 2,
      runs: [
        [unallocated, 3],
        [zero, 4],
        [data, 20],
      ],
    },
    {
      ...layer,
      seed: 3,
      runs: [
        [data, 1],
        [unallocated, 60],
        [data, 3],
      ],
    },
  ])
  chain = []
  for (const { folder, manifest } of stored.chain) {
    const bytes = Buffer.from(`<domain>${manifest.id}</domain>`)
    await storage.put(`${folder}/domain.xml`, bytesBody(bytes))
    const definition = { key: 'domain.xml', size: bytes.byteLength, blake3: blake3Hex(bytes) }
    await publish({ folder, manifest: { ...manifest, definition } })
  }
})

async function publish(backup: StoredBackup): Promise<void> {
  await storage.put(`${backup.folder}/manifest.json`, bytesBody(serializeManifest(backup.manifest)))
  chain = [...chain.filter(({ folder }) => folder !== backup.folder), backup]
}

function link(index: number): { folder: string; manifest: BackupManifest; disk: Qcow2ManifestDisk } {
  const { folder, manifest } = chain.find(({ folder }) => folder.endsWith(layerId(index))) ?? expect.fail()
  const [disk] = manifest.disks
  return { folder, manifest, disk: disk?.format === 'qcow2' ? disk : expect.fail() }
}

/** Replaces an image by another one of the same name, with digests that are right. */
async function forge(
  index: number,
  change: (image: Buffer) => Buffer,
  fields: Partial<Qcow2ManifestDisk> = {},
) {
  const { folder, manifest, disk } = link(index)
  storage.damage(`${folder}/vda.qcow2`, change)
  const digester = new BlockDigester(BLOCK)
  digester.update(storage.objects.get(`${folder}/vda.qcow2`) ?? expect.fail())
  const { size, digest, blocks } = digester.finish()
  await storage.put(`${folder}/vda.blake3`, bytesBody(blocks))
  const disks = [{ ...disk, storedSize: size, digest, ...fields }]
  await publish({ folder, manifest: { ...manifest, disks } })
}

function flipBit(key: string, offset: number, bit = 0): void {
  storage.damage(key, bytes => {
    bytes.writeUInt8(bytes.readUInt8(offset) ^ (1 << bit), offset)
    return bytes
  })
}

/** The same storage, which breaks downloads off. */
function withObjects(from: WatchedStorage, fault: MemoryStorageOptions['fault'] & object): WatchedStorage {
  const storage = new WatchedStorage({ fault })
  for (const [key, bytes] of from.objects) storage.objects.set(key, bytes)
  return storage
}

async function problems(options: { deep?: boolean } = { deep: true }, id = NEWEST) {
  const { problems, ok } = await chains.verify(id, options)
  expect(ok).toBe(problems.length === 0)
  return problems.map(({ message: _, ...problem }) => problem)
}

describe('verifying a whole chain', () => {
  it.each([false, true])('finds nothing wrong (deep: %s)', async deep => {
    expect(await chains.verify(NEWEST, { deep })).toEqual({
      backup: NEWEST,
      chain: [layerId(0), layerId(1), NEWEST],
      deep,
      ok: true,
      problems: [],
    })
  })

  it('looks at what the backup rests on, and at nothing else', async () => {
    flipBit(`${link(2).folder}/vda.qcow2`, 100)
    expect(await problems({ deep: true }, layerId(1))).toEqual([])
  })

  it('expects the size of a disk in its image to be rounded up to whole sectors', async () => {
    const { virtualSize } = link(2).disk
    await forge(2, image => image, { virtualSize: virtualSize - 511 })
    expect(await problems()).toEqual([])
    await forge(2, image => image, { virtualSize: virtualSize - 512 })
    expect(await problems()).toMatchObject([{ code: 'IMAGE_INVALID' }])
  })

  it('reads no image unless it is deep', async () => {
    await chains.verify(NEWEST)
    expect(storage.calls.filter(call => /^get .*(qcow2|blake3|xml)/.test(call))).toEqual([])
  })

  it('tells how far it is, now and then and at the end', async () => {
    const told: VerifyProgress[] = []
    let now = 0
    vi.spyOn(performance, 'now').mockImplementation(() => (now += 150))
    await chains.verify(NEWEST, { deep: true, onProgress: progress => told.push(progress) })
    vi.restoreAllMocks()

    const read = storage.downloads.filter(({ key }) => !key.endsWith('manifest.json'))
    const total = [...storage.objects]
      .filter(([key]) => !key.endsWith('manifest.json'))
      .reduce((sum, [, { length }]) => sum + length, 0)
    expect(told.every(({ bytesTotal }) => bytesTotal === total)).toBe(true)
    expect(told.at(-1)?.bytesDone).toBe(total)
    const done = told.map(({ bytesDone }) => bytesDone)
    expect(done).toEqual([...done].sort((a, b) => a - b))
    // Chunks come 150 ms apart, so every second one is 200 ms after the last that was told of.
    const chunks = read.reduce((sum, { sent }) => sum + Math.ceil(sent / BLOCK), 0)
    expect(told.length).toBeGreaterThan(chunks / 3)
    expect(told.length).toBeLessThan(chunks / 2 + 3)
  })

  it('goes on where a download broke off', async () => {
    let broken = false
    const { folder } = link(0)
    storage = withObjects(storage, (key, offset) => {
      if (broken || key !== `${folder}/vda.qcow2` || offset < 2 * BLOCK) return undefined
      broken = true
      return 'end'
    })
    chains = new ChainManager({ storage })
    expect(await problems()).toEqual([])
    expect(broken).toBe(true)
  })

  it('does not mind a view that throws', async () => {
    const onProgress = () => {
      throw new Error('view is gone')
    }
    expect((await chains.verify(NEWEST, { deep: true, onProgress })).ok).toBe(true)
    await using _ = await noRejectionUnhandled()
    const rejects = async () => onProgress()
    expect((await chains.verify(NEWEST, { deep: true, onProgress: rejects })).ok).toBe(true)
  })
})

describe('verifying finds', () => {
  it('a bit that flipped anywhere in an image, and names its block', { timeout: 60_000 }, async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat({ max: 2 }), fc.nat(), fc.nat({ max: 7 }), async (index, where, bit) => {
        const { folder, disk } = link(index)
        const key = `${folder}/vda.qcow2`
        const offset = where % disk.storedSize
        flipBit(key, offset, bit)
        expect(await problems()).toEqual([
          { backup: layerId(index), code: 'DIGEST_MISMATCH', key, offset: offset - (offset % BLOCK) },
        ])
        expect(await problems({ deep: false })).toEqual([])
        flipBit(key, offset, bit)
      }),
      { numRuns: 20 },
    )
  })

  it('how many blocks of an image are damaged', async () => {
    const { folder } = link(0)
    for (const block of [3, 5, 6]) flipBit(`${folder}/vda.qcow2`, block * BLOCK + 77)
    const { problems } = await chains.verify(NEWEST, { deep: true })
    expect(problems).toHaveLength(1)
    expect(problems[0]).toMatchObject({ code: 'DIGEST_MISMATCH', offset: 3 * BLOCK })
    expect(problems[0]?.message).toMatch(/ 3 of \d+ blocks/)
  })

  it('a damaged list of digests, without blaming the image', async () => {
    const key = `${link(1).folder}/vda.blake3`
    flipBit(key, 40)
    expect(await problems()).toEqual([{ backup: layerId(1), code: 'DIGEST_MISMATCH', key }])
  })

  it('a damaged image whose list is damaged too', async () => {
    const { folder } = link(1)
    flipBit(`${folder}/vda.blake3`, 40)
    flipBit(`${folder}/vda.qcow2`, 70_000)
    expect(await problems()).toEqual([
      { backup: layerId(1), code: 'DIGEST_MISMATCH', key: `${folder}/vda.blake3` },
      { backup: layerId(1), code: 'DIGEST_MISMATCH', key: `${folder}/vda.qcow2` },
    ])
  })

  it('a damaged definition', async () => {
    const key = `${link(2).folder}/domain.xml`
    flipBit(key, 3)
    expect(await problems()).toEqual([{ backup: NEWEST, code: 'DIGEST_MISMATCH', key }])
  })

  it.each(['vda.qcow2', 'vda.blake3', 'domain.xml'])('that %s is gone, short or long', async name => {
    const key = `${link(1).folder}/${name}`
    const bytes = storage.objects.get(key) ?? expect.fail()
    for (const deep of [false, true]) {
      storage.objects.delete(key)
      expect(await problems({ deep })).toEqual([{ backup: layerId(1), code: 'OBJECT_NOT_FOUND', key }])
      storage.objects.set(key, bytes.subarray(1))
      expect(await problems({ deep })).toEqual([{ backup: layerId(1), code: 'SIZE_MISMATCH', key }])
      storage.objects.set(key, Buffer.concat([bytes, bytes]))
      expect(await problems({ deep })).toEqual([{ backup: layerId(1), code: 'SIZE_MISMATCH', key }])
      storage.objects.set(key, bytes)
    }
  })

  it('everything at once, the oldest first', async () => {
    const [full, first, second] = [link(0).folder, link(1).folder, link(2).folder]
    flipBit(`${second}/domain.xml`, 0)
    flipBit(`${first}/vda.qcow2`, 0)
    storage.objects.delete(`${second}/vda.blake3`)
    storage.damage(`${full}/vda.qcow2`, bytes => bytes.subarray(9))
    expect(await problems()).toEqual([
      { backup: layerId(0), code: 'SIZE_MISMATCH', key: `${full}/vda.qcow2` },
      { backup: NEWEST, code: 'OBJECT_NOT_FOUND', key: `${second}/vda.blake3` },
      { backup: layerId(1), code: 'DIGEST_MISMATCH', key: `${first}/vda.qcow2`, offset: 0 },
      { backup: NEWEST, code: 'DIGEST_MISMATCH', key: `${second}/domain.xml` },
    ])
  })

  it('a missing link, and what is wrong above it', async () => {
    storage.drop(link(0).folder)
    flipBit(`${link(2).folder}/vda.qcow2`, 0)
    const report = await chains.verify(NEWEST, { deep: true })
    expect(report.chain).toEqual([layerId(1), NEWEST])
    expect(report.problems.map(({ backup, code }) => [backup, code])).toEqual([
      [NEWEST, 'CHAIN_BROKEN'],
      [NEWEST, 'DIGEST_MISMATCH'],
    ])
  })

  it("that the backup's own manifest is damaged", async () => {
    const key = `${link(2).folder}/manifest.json`
    storage.damage(key, bytes => bytes.subarray(9))
    expect(await chains.verify(NEWEST)).toMatchObject({
      chain: [],
      ok: false,
      problems: [{ backup: NEWEST, code: 'MANIFEST_INVALID', key }],
    })
  })

  it('an image that rests on another one than its manifest says', async () => {
    const name = `../${layerId(0)}/vda.qcow2`
    await forge(1, image =>
      Buffer.from(image.toString('latin1').replace(name, name.replace('vda', 'vdb')), 'latin1'),
    )
    expect(await problems()).toEqual([
      { backup: layerId(1), code: 'IMAGE_INVALID', key: `${link(1).folder}/vda.qcow2` },
    ])
    expect((await chains.verify(NEWEST, { deep: true })).problems[0]?.message).toContain('vdb.qcow2')
  })

  it('an image that rests on nothing where its manifest says that it does', async () => {
    const full = storage.objects.get(`${link(0).folder}/vda.qcow2`) ?? expect.fail()
    await forge(1, () => Buffer.from(full))
    expect(new Set((await problems()).map(({ code }) => code))).toEqual(new Set(['IMAGE_INVALID']))
  })

  it('an image that reads what it rests on as raw', async () => {
    const { disk } = link(1)
    const extents = new ExtentList()
    extents.append(disk.virtualSize, unallocated)
    const { clusterSize, backing: name = '' } = disk
    const layout = planImage(extents, { clusterSize, backing: { name, format: 'raw' } })
    const image = Buffer.alloc(layout.fileSize)
    layout.readMetadata(0, image.subarray(0, layout.dataStart))
    await forge(1, () => image)
    expect((await chains.verify(NEWEST, { deep: true })).problems).toMatchObject([
      { code: 'IMAGE_INVALID', message: expect.stringContaining('backing format is raw') },
    ])
  })

  it.each([
    ['virtualSize', 2 * 1024 * 1024],
    ['clusterSize', 65_536],
  ] as const)('an image of another %s than its manifest says', async (field, value) => {
    await forge(2, image => image, { [field]: value })
    expect(await problems()).toMatchObject([{ backup: NEWEST, code: 'IMAGE_INVALID' }])
  })

  it('an object that is no image, though its digests are right', async () => {
    await forge(0, () => Buffer.alloc(200_000, 'not an image'))
    expect(await problems()).toMatchObject([{ backup: layerId(0), code: 'IMAGE_INVALID' }])
  })

  it('an object that the storage cannot read, and goes on with the others', async () => {
    const { folder } = link(0)
    flipBit(`${link(2).folder}/vda.qcow2`, 0)
    storage.intercept = call => {
      if (call === `get ${folder}/vda.qcow2`) throw new VarveError('STORAGE_FAILED', 'Input/output error.')
    }
    expect(await problems()).toMatchObject([
      { backup: layerId(0), code: 'STORAGE_FAILED' },
      { backup: NEWEST, code: 'DIGEST_MISMATCH' },
    ])
  })

  it('an object that vanishes while it looks', async () => {
    const { folder } = link(1)
    storage.intercept = call => {
      if (call === `get ${folder}/vda.qcow2`) storage.objects.delete(`${folder}/vda.qcow2`)
    }
    expect(await problems()).toMatchObject([{ backup: layerId(1), code: 'OBJECT_NOT_FOUND' }])
  })
})

describe('verifying fails', () => {
  it('for a backup that is not there', async () => {
    await expect(chains.verify(layerId(7))).rejects.toMatchObject({ code: 'BACKUP_NOT_FOUND' })
    await expect(chains.verify('x')).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
  })

  it.each(['STORAGE_UNREACHABLE', 'STORAGE_ACCESS_DENIED'] as const)(
    'with %s, and does not call the backup damaged',
    async code => {
      storage.intercept = call => {
        if (call.endsWith('vda.qcow2')) throw new VarveError(code, 'No.')
      }
      await expect(chains.verify(NEWEST, { deep: true })).rejects.toMatchObject({ code })
    },
  )

  it('where the storage stays busy with an object, and does not call the backup damaged', async () => {
    const options = { retryable: true }
    storage.intercept = call => {
      if (call === `get ${link(0).folder}/vda.qcow2`) throw new VarveError('STORAGE_FAILED', 'Busy.', options)
    }
    const verified = chains.verify(NEWEST, { deep: true })
    await expect(verified).rejects.toMatchObject({ code: 'STORAGE_FAILED', retryable: true })
  })

  it('with the error of a storage that goes away between the digests and the header', async () => {
    const key = `${link(0).folder}/vda.qcow2`
    let reads = 0
    storage.intercept = call => {
      if (call === `get ${key}` && ++reads > 1) throw new VarveError('STORAGE_UNREACHABLE', 'No.')
    }
    await expect(chains.verify(NEWEST, { deep: true })).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
    expect(reads).toBe(2)
  })

  it('where the backup is deleted meanwhile, with what it rests on: that is no damage', async () => {
    storage.intercept = call => {
      if (call === `get ${link(0).folder}/vda.blake3`) for (const { folder } of chain) storage.drop(folder)
    }
    await expect(chains.verify(NEWEST, { deep: true })).rejects.toMatchObject({ code: 'BACKUP_NOT_FOUND' })
  })

  it('when it is given up', async () => {
    const controller = new AbortController()
    storage.intercept = call => {
      if (call.endsWith('vda.qcow2')) controller.abort()
    }
    await expect(chains.verify(NEWEST, { deep: true, signal: controller.signal })).rejects.toMatchObject({
      code: 'ABORTED',
    })
  })
})
