import { mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import type { VarveEvent } from '../src/events.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'

const MiB = 1024 * 1024

let folder: string
let disk: string
let warnings: string[]
let backup: (clusterSize?: number) => Promise<BackupManifest>

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-map-'))
  disk = join(folder, 'vda')
  warnings = []
  await mkdir(join(folder, 'storage'))
  await createQcow2(disk, 8 * MiB)
  await qemuIo(disk, 'qcow2', ['write -P 1 0 2M', 'write -P 2 4M 4M'])
  const host = new ImageHost({ instance: 'web-1', disks: { vda: { path: disk, format: 'qcow2' } } })
  const pipeline = new BackupPipeline({ host, storage: storage(), stateDir: join(folder, 'state') })
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'warning') warnings.push(event.message)
  }
  backup = (clusterSize = 65536) => pipeline.run({ instance: 'web-1', clusterSize }, { onEvent })
})
afterEach(() => rm(folder, { recursive: true }))

const storage = () => new LocalDriver({ path: join(folder, 'storage') })
const stored = ({ chain, id }: BackupManifest, name: string) =>
  join(folder, 'storage', 'web-1', chain, id, name)
const resize = (size: string, ...options: string[]) =>
  execa('qemu-img', ['resize', '-q', '-f', 'qcow2', ...options, disk, size])

/** A backup is to QEMU what the disk is now; they share no file. */
async function expectIsDisk(manifest: BackupManifest): Promise<void> {
  await execa('qemu-img', ['compare', '-f', 'qcow2', '-F', 'qcow2', disk, stored(manifest, 'vda.qcow2')])
}

test.each([
  ['in whole clusters', 65536],
  ['in the middle of a cluster', 2 * MiB],
])(
  'a disk that was shrunk and grown again between two backups, %s, is zero there in the increment, though its bitmap shows no write',
  async (_, clusterSize) => {
    await backup(clusterSize)
    await resize('5M', '--shrink')
    await resize('8M')
    await qemuIo(disk, 'qcow2', ['write -P 3 6M 64k', 'write -P 4 8257536 128k'])
    const increment = await backup(clusterSize)
    expect(increment.disks).toMatchObject([{ kind: 'incremental', virtualSize: 8 * MiB }])
    await expectIsDisk(increment)
    await qemuIo(disk, 'qcow2', ['write -P 5 0 64k'])
    await expectIsDisk(await backup(clusterSize))
    expect(warnings).toEqual([])
  },
)

test('an increment holds nothing of what was neither written nor lost', async () => {
  await backup()
  const increment = await backup()
  const { stdout } = await execa('qemu-img', ['map', '--output=json', stored(increment, 'vda.qcow2')])
  const own = JSON.parse(stdout).filter(({ depth }: { depth: number }) => depth === 0)
  expect(own).toEqual([])
})

test('an increment whose parent has a map that was changed is right without it', async () => {
  const full = await backup()
  const map = await readFile(stored(full, 'vda.map'))
  map[20] = (map[20] ?? 0) ^ 1
  await writeFile(stored(full, 'vda.map'), map)
  await resize('5M', '--shrink')
  await resize('8M')
  const next = await backup()
  await expectIsDisk(next)
  const { problems } = await new ChainManager({ storage: storage() }).verify(full.id, { deep: true })
  expect(problems).toMatchObject([{ key: expect.stringMatching(/vda\.map$/) }])
})
