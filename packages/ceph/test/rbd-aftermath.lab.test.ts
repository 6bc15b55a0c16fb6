import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  type Host,
  ImageHost,
  RestorePipeline,
  type RestoreRequest,
  type VarveEvent,
} from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo, sha256Content } from '@varve/testkit/lab'
import { afterAll, afterEach, beforeAll, beforeEach, expect, test } from 'vitest'
import { CephConnector } from '../src/index.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2

let site: RbdSite
let folder: string
let storage: LocalDriver
let events: VarveEvent[]
let rbd: CephConnector

beforeAll(async () => {
  site = await RbdSite.start()
  const { ceph, user } = site
  rbd = new CephConnector({ conf: ceph.conf, user: user.user, keyring: user.keyring })
})
afterAll(() => site[Symbol.asyncDispose]())
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-rbd-aftermath-'))
  storage = new LocalDriver({ path: join(folder, 'storage'), create: true })
  events = []
})
afterEach(() => rm(folder, { recursive: true }))

const run = { onEvent: (event: VarveEvent) => void events.push(event) }
const warnings = () => events.flatMap(event => (event.type === 'warning' ? [event.message] : []))
const options = (host: Host) => ({ host, storage, stateDir: join(folder, 'state') })
const hostOf = (disks: Record<string, string>): Host => new ImageHost({ instance: 'web-1', disks, rbd })

function backup(disks: Record<string, string>): Promise<BackupManifest> {
  return new BackupPipeline(options(hostOf(disks))).run({ instance: 'web-1' }, run)
}

function inPlace(disks: Record<string, string>, { id }: BackupManifest, only?: string[]) {
  const request: RestoreRequest = { backup: id, to: { instance: 'web-1' }, inPlace: true }
  const pipeline = new RestorePipeline(options(hostOf(disks)))
  return pipeline.run({ ...request, ...(only && { disks: only }) }, run)
}

/** A disk of a backup, restored to a new raw file. */
async function restored({ id }: BackupManifest, disk: string): Promise<string> {
  const path = join(folder, `${id}-${disk}.raw`)
  const request: RestoreRequest = { backup: id, to: { disks: { [disk]: path }, format: 'raw' } }
  await new RestorePipeline(options(hostOf({}))).run(request, run)
  return path
}

const kinds = ({ parent, disks }: BackupManifest) => [parent, ...disks.map(({ kind }) => kind)]

test('after a restore in place to an older backup the chains of an image and a file go on from that', async () => {
  const image = await site.create(16 * MIB)
  const file = join(folder, 'vdb.qcow2')
  await createQcow2(file, 16 * MIB)
  const disks = { vda: `rbd:${image}`, vdb: file }
  const change = async (byte: number) => {
    await site.write(image, `write -P ${byte} ${byte}M 3M`)
    await qemuIo(file, 'qcow2', [`write -P ${byte} ${byte}M 3M`])
  }
  await change(1)
  const first = await backup(disks)
  const wanted = await site.bytes(image)
  const wantedFile = await sha256Content(file, 'qcow2')
  await change(2)
  const second = await backup(disks)

  // One disk alone: both go on from the backup that the other one still shows.
  await inPlace(disks, first, ['vda'])
  const third = await backup(disks)
  expect(kinds(third)).toEqual([second.id, 'incremental', 'incremental'])

  await inPlace(disks, first)
  expect((await site.bytes(image)).equals(wanted)).toBe(true)
  expect(await sha256Content(file, 'qcow2')).toBe(wantedFile)
  await change(5)
  const fourth = await backup(disks)
  expect(kinds(fourth)).toEqual([first.id, 'incremental', 'incremental'])
  expect((await readFile(await restored(fourth, 'vda'))).equals(await site.bytes(image))).toBe(true)
  expect(await sha256Content(await restored(fourth, 'vdb'), 'raw')).toBe(await sha256Content(file, 'qcow2'))
  expect(warnings()).toEqual([])
})

test('the chain of an image alone goes on from what was restored in place, unless a newer snapshot is protected', async () => {
  const image = await site.create(16 * MIB)
  const disks = { vda: `rbd:${image}` }
  await site.write(image, 'write -P 1 0 2M')
  const first = await backup(disks)
  await site.write(image, 'write -P 2 0 16M')
  const second = await backup(disks)
  const snapshot = `${image}@varve-${second.id}`
  await site.ceph.run('rbd', 'snap', 'protect', snapshot)
  await inPlace(disks, first)
  expect(warnings()).toEqual([expect.stringContaining(`varve-${second.id} of ${image} is protected`)])

  await site.ceph.run('rbd', 'snap', 'unprotect', snapshot)
  await inPlace(disks, first)
  expect(await site.snapshots(image)).toEqual([`varve-${first.id}`])
  await site.write(image, 'write -P 3 8M 64k')
  const third = await backup(disks)
  expect(kinds(third)).toEqual([first.id, 'incremental'])
  expect((await readFile(await restored(third, 'vda'))).equals(await site.bytes(image))).toBe(true)
})
