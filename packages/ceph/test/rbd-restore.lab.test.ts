import { mkdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  type BackupManifest,
  BackupPipeline,
  type RbdConnector,
  RestorePipeline,
  recover,
  type VarveEvent,
} from '@varve/core'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test, vi } from 'vitest'
import { clusterWith, expectSame, RbdInstance } from './rbd-instance.ts'
import { RbdSite } from './rbd-site.ts'

const MIB = 1024 ** 2

let site: RbdSite
/** An image, and an instance of it with a chain of two, which the tests restore and each leaves as it holds. */
let image: string
let web: RbdInstance
let full: BackupManifest
let second: BackupManifest
let fullBytes: Buffer
let secondBytes: Buffer

beforeAll(async () => {
  site = await RbdSite.start()
  image = await site.create(8 * MIB, '--object-size', '1M')
  web = await RbdInstance.of(site, `rbd:${image}`)
  await site.write(image, 'write -P 1 0 5M')
  full = await web.backup()
  fullBytes = await site.bytes(image)
  await site.write(image, 'write -P 2 4M 2M', 'discard 0 1M')
  second = await web.backup()
  secondBytes = await site.bytes(image)
})
afterAll(() => site[Symbol.asyncDispose]())

const snapshots = (of: string) => site.snapshots(of)

/** The chain goes on from a backup with an increment that restores to what the image holds. */
async function expectGoesOn(from: BackupManifest): Promise<void> {
  await site.write(image, 'write -P 3 7M 64k')
  const next = await web.backup()
  expect([next.kind, next.parent]).toEqual(['incremental', from.id])
  expectSame(await web.restored(next), await site.bytes(image))
}

test('a restore in place rolls the image back and fetches only what is newer', async () => {
  await site.write(image, 'write -P 9 0 8M')
  expect((await web.restoreInPlace(second)).disks[0]?.bytesWritten).toBe(0)
  expectSame(await site.bytes(image), secondBytes)

  // Over an image that has grown since: everything, and what is behind the disk's end reads as zeros.
  await site.ceph.client.resize(image, 10 * MIB)
  await site.write(image, 'write -P 9 0 10M')
  expect((await web.restoreInPlace(full)).disks[0]?.bytesWritten).toBe(5 * MIB)
  expectSame(await site.bytes(image), Buffer.concat([fullBytes, Buffer.alloc(2 * MIB)]))
  expect(await snapshots(image)).toEqual([`varve-${full.id}`]) // the newer one tells nothing any more
  await site.ceph.client.resize(image, 8 * MIB)
  await expectGoesOn(full)

  // From that older one on. Of an image in a group too, which no new one may replace.
  await site.write(image, 'write -P 9 0 8M')
  await site.ceph.run('rbd', 'group', 'create', 'vms/together')
  await site.ceph.run('rbd', 'group', 'image', 'add', 'vms/together', image)
  const to = { disks: { vda: `rbd:${image}` }, overwrite: true }
  await expect(web.restore({ backup: second.id, to })).rejects.toMatchObject({
    code: 'DISK_UNSUPPORTED',
    message: expect.stringMatching(/in the group .*together.*in place/),
  })
  expect((await web.restoreInPlace(second)).disks[0]?.bytesWritten).toBe(2 * MIB)
  expectSame(await site.bytes(image), secondBytes)
  await site.ceph.run('rbd', 'group', 'rm', 'vms/together')
  await expectGoesOn(second)
})

test('a restore makes a new image, or replaces one by a new one, and the chain goes on from it', async () => {
  const copy = site.newImage()
  web.events.length = 0
  await web.restore({ backup: second.id, to: { disks: { vda: `rbd:${copy}` } } })
  expectSame(await site.bytes(copy), secondBytes)
  expect(await snapshots(copy)).toEqual([]) // no backup of it would ever remove one
  const asked = web.events.flatMap(event => (event.type === 'command' ? [event.args[0]] : []))
  const looks = asked.slice(0, asked.indexOf('create'))
  expect(looks.filter(verb => verb === 'info')).toHaveLength(1) // once it is held

  await site.write(image, 'write -P 9 0 8M')
  const to = { disks: { vda: `rbd:${image}` } }
  await expect(web.restore({ backup: second.id, to })).rejects.toMatchObject({ code: 'TARGET_EXISTS' })
  const { id } = await site.cluster.image(image)
  await web.restore({ backup: second.id, to: { ...to, overwrite: true } })
  expectSame(await site.bytes(image), secondBytes)
  const info = await site.ceph.run('rbd', 'info', image)
  expect(info).not.toContain(id)
  expect(info).toContain('order 20') // objects of 1 MiB, as before
  expect((await site.ceph.client.list('vms')).filter(name => name.includes('varve'))).toEqual([])
  await expectGoesOn(second)
})

test('an image that another client has open is not restored in place under it', async () => {
  await site.write(image, 'write -P 2 0 4M')
  const now = await site.bytes(image)

  /** Restores in place, and gives up once the image is seen open for the second time. */
  const givenUp = async (connector: RbdConnector, isOpen: () => boolean) => {
    const controller = new AbortController()
    let looks = 0
    const onEvent = (event: VarveEvent) => {
      if (event.type === 'command' && event.args[0] === 'status' && isOpen() && ++looks > 1)
        controller.abort()
    }
    const request = { backup: second.id, to: { instance: 'web-1' }, inPlace: true }
    return new RestorePipeline(web.parts(connector)).run(request, { signal: controller.signal, onEvent })
  }
  {
    await using _machine = await site.opened(image)
    await expect(givenUp(site.rbd, () => true)).rejects.toMatchObject({ code: 'ABORTED', context: {} })
  }
  expectSame(await site.bytes(image), now)

  // One that opens it while it is written over.
  let machine: AsyncDisposable | undefined
  const late = clusterWith(site.rbd, cluster => ({
    async rollback(...args) {
      await cluster.rollback(...args)
      machine = await site.opened(image)
    },
  }))
  const incomplete = { code: 'ABORTED', context: { incomplete: ['vda'] } }
  await expect(givenUp(late, () => machine !== undefined)).rejects.toMatchObject(incomplete)
  await machine?.[Symbol.asyncDispose]()
  // Another host has not the record of the restore.
  const other = new BackupPipeline({ ...web.parts(site.rbd), stateDir: join(web.folder, 'other state') })
  await expect(other.run({ instance: 'web-1' })).rejects.toMatchObject({
    code: 'DISK_INCOMPLETE',
    message: expect.stringContaining(`rbd image-meta remove ${image} varve.incomplete.`),
  })
  await web.restore({ backup: second.id, to: { instance: 'web-1' }, inPlace: true })
  expectSame(await site.bytes(image), secondBytes)
  const { metadata } = await site.cluster.image(image)
  expect([...metadata.keys()].filter(key => key.includes('incomplete'))).toEqual([])
})

test('a stream or an index that was changed is refused, and nothing is restored', async () => {
  await site.write(image, 'write -P 2 0 4M')
  const now = await site.bytes(image)
  for (const name of ['vda.rbd-diff', 'vda.index']) {
    const path = join(web.folder, 'storage', 'web-1', second.chain, second.id, name)
    const at = Math.floor((await stat(path)).size / 2)
    const flip = async () => {
      const bytes = await readFile(path)
      bytes[at] = (bytes[at] ?? 0) ^ 1
      await writeFile(path, bytes)
    }
    await flip()
    const target = join(web.folder, 'target.qcow2')
    const restoring = web.restore({ backup: second.id, to: { disks: { vda: target } } })
    await expect(restoring).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
    const { problems } = await web.chains.verify(second.id, { deep: true })
    expect(problems.map(({ code, key }) => [code, key?.split('/').at(-1)])).toEqual([
      ['DIGEST_MISMATCH', name],
    ])
    // In place, of which the stream is not needed: the image has the backup's snapshot.
    if (name === 'vda.index')
      await expect(web.restoreInPlace(second)).rejects.toMatchObject({ code: 'DIGEST_MISMATCH' })
    await flip()
  }
  // Nor is an image rolled back that QEMU cannot serve.
  const bin = join(web.folder, 'bin')
  await mkdir(bin)
  await writeFile(join(bin, 'qemu-nbd'), '#!/bin/sh\necho "Unknown protocol \'rbd\'" >&2\nexit 1\n', {
    mode: 0o755,
  })
  vi.stubEnv('PATH', `${bin}:${process.env.PATH}`)
  await expect(web.restoreInPlace(second).finally(() => vi.unstubAllEnvs())).rejects.toMatchObject({
    code: 'NBD_SOCKET_MISSING',
    message: expect.stringContaining('qemu-block-extra'),
  })
  expectSame(await site.bytes(image), now)
  const { stateDir, storage } = web
  expect(await recover({ stateDir, storages: [storage], rbd: site.rbd })).toEqual({ runs: [], ok: true })
})

test('images and files restore to each other', async () => {
  const files = await RbdInstance.of(site, {})
  const file = join(files.folder, 'vda.qcow2')
  const onFile = files.with({ vda: file })
  await createQcow2(file, 8 * MIB)
  await qemuIo(file, 'qcow2', ['write -P 2 3M 3M', 'write -P 4 7M 100k'])
  const manifest = await onFile.backup()
  const copy = site.newImage()
  const onImage = files.with({ vda: `rbd:${copy}` })
  await onImage.restore({ backup: manifest.id, to: { disks: { vda: `rbd:${copy}` } } })
  expectSame(await site.bytes(copy), await onFile.rawOf(file))
  // A chain, over an image that has other data.
  await qemuIo(file, 'qcow2', ['write -P 5 4M 1M', 'write -z 3M 64k', 'discard 7M 1M'])
  const next = await onFile.backup()
  expect(next.kind).toBe('incremental')
  await site.write(copy, 'write -P 9 0 8M')
  await onImage.restoreInPlace(next)
  expectSame(await site.bytes(copy), await onFile.rawOf(file))
  // The disk is an image from here on: a full one, and told why.
  const moved = await onImage.backup()
  expect(moved.disks[0]).toMatchObject({ kind: 'full', fallback: 'disk-replaced' })
})

test('an image with clones is not replaced, and its backups go on from the snapshots that they need', async () => {
  const own = await site.create(4 * MIB)
  const instance = await RbdInstance.of(site, `rbd:${own}`)
  await site.write(own, 'write -P 1 0 2M')
  const first = await instance.backup()
  const [clone, old] = [site.newImage(), site.newImage()]
  const origin = `${own}@varve-${first.id}`
  await site.ceph.run('rbd', 'clone', '--rbd-default-clone-format', '2', origin, clone)
  const wanted = await site.bytes(own)
  await site.write(own, 'write -P 2 0 1M')
  const before = await site.bytes(own)
  const over = { backup: first.id, to: { disks: { vda: `rbd:${own}` }, overwrite: true } }
  await expect(instance.restore(over)).rejects.toMatchObject({
    code: 'RBD_SNAPSHOT_PROTECTED',
    context: { clone },
  })
  expectSame(await site.bytes(own), before)
  const next = await instance.backup({ rbdSnapshots: 1 }) // the first one's goes, as far as Ceph lets it
  expect(await snapshots(own)).not.toContain(`varve-${first.id}`)
  await expect(instance.restore(over)).rejects.toMatchObject({ code: 'RBD_SNAPSHOT_PROTECTED' })
  // A clone of version 1 needs a snapshot that is protected, and so stays.
  const kept = `varve-${next.id}`
  await site.ceph.run('rbd', 'snap', 'protect', `${own}@${kept}`)
  await site.ceph.run('rbd', 'clone', '--rbd-default-clone-format', '1', `${own}@${kept}`, old)
  await instance.restoreInPlace(first)
  expectSame(await site.bytes(own), wanted)
  expectSame(await site.bytes(clone), wanted)
  const last = await instance.backup({ rbdSnapshots: 1 })
  expect([last.kind, last.parent]).toEqual(['incremental', next.id])
  const warning = expect.stringContaining(`${kept} of ${own} is protected`)
  expect(instance.warnings()).toEqual([warning, warning]) // of the restore, and of the backup
  expect(await snapshots(own)).toContain(kept)
  expectSame(await instance.restored(last), wanted)
  const { stateDir, storage } = instance
  expect(await recover({ stateDir, storages: [storage], rbd: site.rbd })).toEqual({ runs: [], ok: true })
})
