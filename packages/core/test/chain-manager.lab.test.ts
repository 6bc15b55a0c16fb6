import { cp, mkdir, mkdtemp, open, readdir, rm, stat, truncate, utimes, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { execa } from 'execa'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'

const MiB = 1024 * 1024
const BLOCK = 4 * MiB

/** Where the chains are made once; each test works on a copy of the storage. */
let workshop: string
/** Two chains, of three backups and of one, oldest first. */
let backups: BackupManifest[]

let path: string
let chains: ChainManager

beforeAll(async () => {
  workshop = await mkdtemp(join(tmpdir(), 'varve-chains-'))
  const disk = join(workshop, 'disk.qcow2')
  await mkdir(join(workshop, 'storage'))
  await execa('qemu-img', ['create', '-f', 'qcow2', disk, '16M'])
  const pipeline = new BackupPipeline({
    host: new ImageHost({ instance: 'web 1', disks: { vda: disk } }),
    storage: new LocalDriver({ path: join(workshop, 'storage') }),
    stateDir: join(workshop, 'state'),
  })
  backups = []
  const writes = [
    ['auto', 'write -P 1 0 10M'],
    ['auto', 'write -P 2 1M 5M', 'write -z 6M 2M'],
    ['auto', 'write -P 3 15M 64k', 'write -z 0 64k'],
    ['full', 'write -P 4 7M 5M'],
  ] as const
  for (const [type, ...commands] of writes) {
    await execa('qemu-io', ['-f', 'qcow2', ...commands.flatMap(command => ['-c', command]), disk])
    backups.push(await pipeline.run({ instance: 'web 1', type }))
    await execa('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', disk, reference(backups.length - 1)])
  }
  expect(backups.map(({ kind }) => kind)).toEqual(['full', 'incremental', 'incremental', 'full'])
})
afterAll(() => rm(workshop, { recursive: true }))

beforeEach(async () => {
  path = await mkdtemp(join(workshop, 'copy-'))
  await cp(join(workshop, 'storage'), path, { recursive: true, preserveTimestamps: true })
  chains = new ChainManager({ storage: new LocalDriver({ path }) })
})
afterEach(() => rm(path, { recursive: true }))

/** What the disk held at a backup, as QEMU read it then. */
const reference = (index: number) => join(workshop, `reference-${index}.raw`)

function backup(index: number): BackupManifest {
  return backups[index] ?? expect.fail()
}

function folder(index: number): string {
  const { chain, id } = backup(index)
  return join(path, 'web%201', chain, id)
}

const key = (index: number, name: string) => `${folder(index).slice(path.length + 1)}/${name}`

async function flipBit(file: string, offset: number): Promise<void> {
  const handle = await open(file, 'r+')
  const byte = Buffer.alloc(1)
  await handle.read(byte, 0, 1, offset)
  byte.writeUInt8(byte.readUInt8(0) ^ 0x10)
  await handle.write(byte, 0, 1, offset)
  await handle.close()
}

/** Every file below the storage. */
async function files(): Promise<string[]> {
  const found = await readdir(path, { recursive: true, withFileTypes: true })
  return found
    .filter(entry => entry.isFile())
    .map(entry => join(entry.parentPath, entry.name))
    .sort()
}

describe('a chain that the pipeline stored', () => {
  test('is found whole', async () => {
    for (const { id } of backups) {
      const { ok, problems } = await chains.verify(id, { deep: true })
      expect(problems).toEqual([])
      expect(ok).toBe(true)
    }
    expect((await chains.resolve(backup(2).id)).map(({ manifest }) => manifest)).toEqual(backups.slice(0, 3))
  })

  test('is found damaged by one bit, wherever it is', async () => {
    for (const name of await readdir(folder(1))) {
      if (name === 'manifest.json') continue
      const file = join(folder(1), name)
      const { size } = await stat(file)
      for (const offset of [0, Math.floor(size / 2), size - 1]) {
        await flipBit(file, offset)
        expect((await chains.verify(backup(2).id)).ok).toBe(true)
        const { problems } = await chains.verify(backup(2).id, { deep: true })
        expect(problems).toMatchObject([{ backup: backup(1).id, code: 'DIGEST_MISMATCH', key: key(1, name) }])
        if (name === 'vda.qcow2') expect(problems[0]?.offset).toBe(offset - (offset % BLOCK))
        await flipBit(file, offset)
      }
    }
    expect((await chains.verify(backup(2).id, { deep: true })).ok).toBe(true)
  })

  test('is found damaged when an object is cut short or gone', async () => {
    for (const [index, name] of ['vda.qcow2', 'vda.blake3'].entries()) {
      const { size } = await stat(join(folder(index), name))
      await truncate(join(folder(index), name), size - 1)
      expect((await chains.verify(backup(2).id)).problems).toMatchObject([
        { backup: backup(index).id, code: 'SIZE_MISMATCH', key: key(index, name) },
      ])
      await rm(join(folder(index), name))
      expect((await chains.verify(backup(2).id)).problems).toMatchObject([
        { backup: backup(index).id, code: 'OBJECT_NOT_FOUND', key: key(index, name) },
      ])
      await cp(join(workshop, 'storage'), path, { recursive: true })
    }
  })

  test('is broken without one of its links', async () => {
    await rm(folder(1), { recursive: true })
    expect((await chains.verify(backup(2).id)).problems).toMatchObject([{ code: 'CHAIN_BROKEN' }])
    await expect(chains.resolve(backup(2).id)).rejects.toMatchObject({
      code: 'CHAIN_BROKEN',
      context: { link: backup(1).id },
    })
    expect((await chains.resolve(backup(0).id)).length).toBe(1)
  })

  test('is found forged when an image and its digests were replaced by those of another backup', async () => {
    await cp(join(folder(3), 'vda.qcow2'), join(folder(0), 'vda.qcow2'))
    await cp(join(folder(3), 'vda.blake3'), join(folder(0), 'vda.blake3'))
    expect((await chains.verify(backup(0).id, { deep: true })).ok).toBe(false)
  })
})

describe('on a real file system', () => {
  test('deletion takes the whole folder, and children first', async () => {
    await expect(chains.delete(backup(0).id)).rejects.toMatchObject({
      code: 'CHAIN_DEPENDENCY',
      context: { children: [backup(2).id, backup(1).id] },
    })
    for (const index of [2, 1, 0]) {
      await chains.delete(backup(index).id)
      await expect(stat(folder(index))).rejects.toMatchObject({ code: 'ENOENT' })
    }
    expect((await chains.list()).backups.map(({ manifest }) => manifest.id)).toEqual([backup(3).id])
  })

  test('what pruning keeps is to qemu-img what the disk held', async () => {
    const before = await files()
    await chains.prune({ keepLast: 1 }, { dryRun: true })
    expect(await files()).toEqual(before)

    await chains.delete(backup(3).id)
    await chains.delete(backup(2).id)
    const { removed } = await chains.prune({ keepLast: 1 })
    expect(removed).toEqual([])
    const newest = join(folder(1), 'vda.qcow2')
    await execa('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', newest, reference(1)])
  })

  test('pruning leaves nothing of what it removes', async () => {
    const { kept, removed } = await chains.prune({ keepLast: 1 })
    expect(kept.map(({ backup }) => backup.manifest.id)).toEqual([backup(3).id])
    expect(removed.map(({ manifest }) => manifest.id)).toEqual([2, 1, 0].map(index => backup(index).id))
    expect((await files()).every(file => file.startsWith(folder(3)))).toBe(true)
    const image = join(folder(3), 'vda.qcow2')
    await execa('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', image, reference(3)])
  })

  test('pruning removes dead uploads after their age, and none that may be alive', async () => {
    const id = '20240101-000000-000-abcdef'
    const alive = join(path, 'web%201', id, id)
    const dead = join(path, 'web%202', id, id)
    const old = new Date(Date.now() - 25 * 60 * 60 * 1000)
    for (const folder of [alive, dead]) {
      await mkdir(folder, { recursive: true })
      for (const name of ['vda.qcow2', '.varve-part-vdb.qcow2']) await writeFile(join(folder, name), 'part')
    }
    for (const name of ['vda.qcow2', '.varve-part-vdb.qcow2']) await utimes(join(dead, name), old, old)

    const { garbage } = await chains.prune({ keepLast: 9 })
    expect(garbage).toEqual([{ folder: `web%202/${id}/${id}`, objects: 1, bytes: 4 }])
    expect((await files()).filter(file => file.startsWith(dead))).toEqual([])
    expect(await readdir(alive)).toEqual(['.varve-part-vdb.qcow2', 'vda.qcow2'])
    expect((await chains.list()).backups).toHaveLength(4)
  })
})
