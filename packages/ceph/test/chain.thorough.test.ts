import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  ChainManager,
  ImageHost,
  RestorePipeline,
  type StorageDriver,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { S3Driver } from '@varve/driver-s3'
import { type RadosgwLab, startRadosgw } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { Random } from '../../core/test/torture/random.ts'
import { makeBucket, rawClient } from '../../driver-s3/test/s3-target.ts'
import { ModelDisk } from './model-disk.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2
const SEED = 20261127
const BACKUPS = 10

let site: RbdSite
let gateway: RadosgwLab
let folder: string
let s3: S3Driver

beforeAll(async () => {
  site = await RbdSite.start()
  gateway = await startRadosgw(site.ceph)
  folder = await mkdtemp(join(tmpdir(), 'varve-rbd-chain-'))
  const user = await gateway.createUser('chain')
  const bucket = await makeBucket(rawClient(gateway, user))
  const { accessKey, secretKey } = user
  s3 = new S3Driver({ endpoint: gateway.endpoint, bucket, accessKey, secretKey })
})
afterAll(async () => {
  await s3?.[Symbol.asyncDispose]()
  await gateway?.[Symbol.asyncDispose]()
  await site[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

test('chains of ten, kept side by side in a folder and on S3, hold what random changes left at each backup', {
  timeout: 600_000,
}, async () => {
  const random = new Random(SEED)
  const image = await site.create(3 * MIB, '--object-size', '512K')
  const disk = new ModelDisk(site, { image, size: 3 * MIB, resizeOneIn: 3 }, random)
  const host = new ImageHost({ instance: 'web-1', disks: { vda: `rbd:${image}` }, rbd: site.rbd })
  const stateDir = join(folder, 'state')
  const storages: StorageDriver[] = [new LocalDriver({ path: join(folder, 'local'), create: true }), s3]
  const taken = storages.map(() => [] as { manifest: BackupManifest; bytes: Buffer }[])

  for (let step = 0; step < BACKUPS; step++) {
    for (const [index, storage] of storages.entries()) {
      await disk.change()
      const manifest = await new BackupPipeline({ host, storage, stateDir }).run({ instance: 'web-1' })
      expect(manifest.kind, `seed ${SEED}, step ${step}`).toBe(step === 0 ? 'full' : 'incremental')
      taken[index]?.push({ manifest, bytes: Buffer.from(disk.bytes) })
    }
  }
  // The model itself is right.
  expect(Buffer.compare(await site.bytes(image), disk.bytes)).toBe(0)

  const path = join(folder, 'restored')
  for (const [index, storage] of storages.entries()) {
    const pipeline = new RestorePipeline({ host, storage, stateDir })
    const looked = (taken[index] ?? []).filter((_, step) => step % 3 === index) // of the folder the newest too
    for (const { manifest, bytes } of looked) {
      await pipeline.run({
        backup: manifest.id,
        to: { disks: { vda: path }, format: 'raw', overwrite: true },
      })
      const what = `seed ${SEED}: ${manifest.id} on ${storage.type}`
      expect(Buffer.compare(await readFile(path), bytes), what).toBe(0)
    }
    const newest = taken[index]?.at(-1)
    const report = await new ChainManager({ storage }).verify(newest?.manifest.id ?? '', { deep: true })
    expect(report).toMatchObject({ ok: true, chain: { length: BACKUPS } })
    // The newest, over the image, which the other chain has changed since.
    await pipeline.run({
      backup: newest?.manifest.id ?? '',
      to: { disks: { vda: `rbd:${image}` }, overwrite: true },
    })
    expect(Buffer.compare(await site.bytes(image), newest?.bytes ?? Buffer.alloc(0))).toBe(0)
  }
})
