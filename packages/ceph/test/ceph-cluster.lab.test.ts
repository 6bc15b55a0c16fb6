import { mkdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { buffer } from 'node:stream/consumers'
import type { RbdExport, VarveEvent } from '@varve/core'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test, vi } from 'vitest'
import { CephConnector, type CephOptions } from '../src/index.ts'
import { RbdSite } from './rbd-site.ts'
import { applyDiff } from './stream-model.ts'

const MIB = 2 ** 20

let site: RbdSite
/** An image with a snapshot `one`, of which an export waits for its reader. */
let large: string

beforeAll(async () => {
  site = await RbdSite.start()
  large = await site.create(32 * MIB)
  await site.write(large, 'write -P 1 0 32M')
  await site.ceph.client.createSnapshot(large, 'one')
})
afterAll(() => site[Symbol.asyncDispose]())

/** What `rbd info` says. */
async function info(image: string): Promise<Record<string, unknown>> {
  return JSON.parse(await site.ceph.run('rbd', 'info', '--format', 'json', image))
}

test('an image is made, looked at, renamed and removed, also under an odd name', async () => {
  const { cluster, ceph } = site
  const image = 'vms/a b:c%é,=1'
  await cluster.createImage(image, { size: 5 * MIB + 512 })
  await cluster.createImage(image, { size: 5 * MIB + 512 }) // is there already
  const made = await cluster.image(image)
  expect(made).toEqual({
    id: expect.any(String),
    size: 5 * MIB + 512,
    snapshots: [],
    metadata: new Map(),
    objectMapInvalid: false,
  })
  await expect(cluster.createImage(image, { size: MIB })).rejects.toMatchObject({ code: 'TARGET_EXISTS' })

  await cluster.renameImage(image, 'vms/other')
  await cluster.renameImage(image, 'vms/other') // has been done
  expect(await cluster.imageId('vms/other')).toBe(made.id)
  await expect(cluster.image(image)).rejects.toMatchObject({ code: 'DISK_NOT_FOUND' })
  await expect(cluster.renameImage(image, 'vms/third')).rejects.toMatchObject({ code: 'DISK_NOT_FOUND' })
  await cluster.createImage(image, { size: MIB })
  expect(await cluster.imageId(image)).not.toBe(made.id)
  const taken = cluster.renameImage(image, 'vms/other')
  await expect(taken).rejects.toMatchObject({
    code: 'TARGET_EXISTS',
    message: expect.stringContaining('vms/other already'),
  })

  await cluster.removeImage('vms/other')
  await cluster.removeImage('vms/other') // is removed already
  expect(await ceph.client.list('vms')).not.toContain('other')
})

test('an image that is made like another has its features, its layout and its settings', async () => {
  const { cluster, ceph } = site
  await ceph.createRbdPool('data')
  const features = ['layering', 'exclusive-lock', 'journaling'].flatMap(name => ['--image-feature', name])
  const layout = ['--object-size', '1M', '--stripe-unit', '64K', '--stripe-count', '4', '--data-pool', 'data']
  const model = await site.create(20 * MIB, ...features, ...layout)
  await ceph.run('rbd', 'config', 'image', 'set', model, 'rbd_qos_iops_limit', '100')
  await cluster.setMetadata(model, 'varve.own', '1')
  const made = site.newImage()
  await cluster.createImage(made, { size: 7 * MIB, like: model })
  const told = ['features', 'object_size', 'stripe_unit', 'stripe_count', 'data_pool']
  const [is, wanted] = [await info(made), await info(model)]
  expect(told.map(key => is[key])).toEqual(told.map(key => wanted[key]))
  expect(is).toMatchObject({ size: 7 * MIB, stripe_unit: 65536, data_pool: 'data' })
  expect(JSON.parse(await ceph.run('rbd', 'image-meta', 'ls', '--format', 'json', made))).toEqual({
    conf_rbd_qos_iops_limit: '100',
  })
  const plain = await site.create(MIB, '--rbd-default-features', '0')
  const bare = site.newImage()
  await cluster.createImage(bare, { size: MIB, like: plain })
  expect(await info(bare)).toMatchObject({ features: [] })
})

test('images live in namespaces', async () => {
  const { cluster, ceph } = site
  const image = 'vms/tenant/disk'
  await expect(cluster.image(image)).rejects.toMatchObject({ code: 'CEPH_POOL_NOT_FOUND' })
  await ceph.run('rbd', 'namespace', 'create', 'vms/tenant')
  await cluster.createImage(image, { size: MIB })
  await cluster.createSnapshot(image, 'one')
  expect(await buffer(cluster.exportDiff(image, { snapshot: 'one' }).stream)).toHaveLength(12 + 8 + 9 + 1)
  await cluster.renameImage(image, 'vms/tenant/renamed')
  expect((await ceph.run('rbd', 'ls', 'vms/tenant')).trim()).toBe('renamed')
  const moved = cluster.renameImage('vms/tenant/renamed', 'vms/renamed')
  await expect(moved).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
})

test('a snapshot is made once, and removed once, however often it is asked for; its number is never used again', async () => {
  const { cluster } = site
  const image = await site.create(MIB)
  const first = await site.takeSnapshot(image, 'one')
  expect(await site.takeSnapshot(image, 'one')).toEqual(first)
  expect(first).toEqual({ name: 'one', id: expect.any(Number) })
  await site.ceph.client.createSnapshot(image, 'two')
  await cluster.removeSnapshots(image, ['one', 'never'])
  await cluster.removeSnapshots(image, ['one'])
  expect(await site.snapshots(image)).toEqual(['two'])
  const again = await site.takeSnapshot(image, 'one')
  const listed = await cluster.snapshots(image)
  expect(listed.map(({ name }) => name)).toEqual(['two', 'one'])
  expect(listed[1]).toEqual(again)
  expect(again.id).toBeGreaterThan(listed[0]?.id ?? 0)
  expect(listed[0]?.id).toBeGreaterThan(first.id)
  await cluster.removeSnapshots('vms/nothing', ['one'])
})

test("metadata of Varve's is kept, whatever it looks like, and that of others is left out", async () => {
  const { cluster, ceph } = site
  const image = await site.create(MIB)
  await ceph.run('rbd', 'image-meta', 'set', image, 'owner', 'me')
  await cluster.setMetadata(image, 'varve.a', '-1')
  await cluster.setMetadata(image, 'varve.a', '--conf=/x y')
  await cluster.setMetadata(image, 'varve.b', '7')
  expect((await cluster.image(image)).metadata).toEqual(
    new Map([
      ['varve.a', '--conf=/x y'],
      ['varve.b', '7'],
    ]),
  )
})

test('an image is rolled back to a snapshot, size included', async () => {
  const { cluster, ceph } = site
  const image = await site.create(8 * MIB)
  await site.write(image, 'write -P 1 0 1M')
  const before = await site.bytes(image)
  const snapshot = await site.takeSnapshot(image, 'one')
  await site.write(image, 'write -P 2 0 5M')
  await ceph.client.resize(image, 16 * MIB)
  await cluster.rollback(image, 'one')
  expect((await site.bytes(image)).equals(before)).toBe(true)
  expect(await cluster.snapshots(image)).toEqual([snapshot]) // the very same
  await expect(cluster.rollback(image, 'two')).rejects.toMatchObject({ code: 'RBD_SNAPSHOT_NOT_FOUND' })
})

test('an export tells what rbd prints, once it has been read', async () => {
  const commands: VarveEvent[] = []
  const onEvent = (event: VarveEvent) => commands.push(event)
  const full = site.cluster.exportDiff(large, { snapshot: 'one' }, { onEvent })
  expect(() => full.diff()).toThrow(/not been read to its end/)
  const bytes = await buffer(full.stream)
  expect(full.diff()).toMatchObject({ toSnapshot: 'one', size: 32 * MIB, streamSize: bytes.length })
  expect(full.diff().fromSnapshot).toBeUndefined()
  expect(full.position).toBe(32 * MIB)
  expect(applyDiff(full.diff(), bytes, Buffer.alloc(0)).equals(await site.bytes(large))).toBe(true)
  expect(commands).toMatchObject([{ type: 'command', command: 'rbd', exitCode: 0 }])
})

test('an export fails with what is missing, and gives no whole stream', async () => {
  const { cluster } = site
  const image = await site.create(MIB)
  await site.ceph.client.createSnapshot(image, 'one')
  for (const what of [{ snapshot: 'two' }, { snapshot: 'one', from: 'nothing' }]) {
    const { stream, diff } = cluster.exportDiff(image, what)
    await expect(buffer(stream)).rejects.toMatchObject({ code: 'RBD_SNAPSHOT_NOT_FOUND' })
    expect(diff).toThrow()
  }
  const nowhere = cluster.exportDiff('vms/nowhere', { snapshot: 'one' })
  await expect(buffer(nowhere.stream)).rejects.toMatchObject({ code: 'DISK_NOT_FOUND' })
})

/** The ids of the rbd processes that export this image. */
async function exporters(image: string): Promise<string> {
  const pattern = `rbd export-diff.*--image=${image.replace('vms/', '')} `
  return (await execa('pgrep', ['-f', pattern], { reject: false })).stdout
}

test('an export that is given up, or left, ends its rbd before it is closed', async () => {
  const { cluster } = site
  const image = large
  const given = new AbortController()
  const { stream } = cluster.exportDiff(image, { snapshot: 'one' }, { signal: given.signal })
  const reading = (async () => {
    for await (const _ of stream) {
      expect(await exporters(image)).not.toBe('')
      given.abort(new Error('enough'))
    }
  })()
  await expect(reading).rejects.toMatchObject({ code: 'ABORTED' })
  expect(await exporters(image)).toBe('')

  const left = cluster.exportDiff(image, { snapshot: 'one' })
  for await (const _ of left.stream) break
  expect(left.diff).toThrow()
  expect(await exporters(image)).toBe('')
})

test('an export whose rbd is killed fails', async () => {
  const { cluster } = site
  const image = large
  const { stream } = cluster.exportDiff(image, { snapshot: 'one' })
  const reading = (async () => {
    let killed = false
    for await (const _ of stream) {
      if (!killed) process.kill(Number(await exporters(image)), 'SIGKILL')
      killed = true
    }
  })()
  await expect(reading).rejects.toMatchObject({
    code: 'RBD_FAILED',
    message: expect.stringContaining('ended by SIGKILL'),
  })
})

test('an export is refused where rbd fails at its end, ends early, or gives another one than was asked for', async () => {
  const { cluster, ceph } = site
  const image = await site.create(4 * MIB)
  for (const snapshot of ['one', 'two', 'three']) {
    await site.write(image, `write -P ${snapshot.length} 0 256k`)
    await ceph.client.createSnapshot(image, snapshot)
  }
  const failed = { code: 'RBD_FAILED', message: expect.stringContaining('Input/output error') }
  const invalid = { code: 'RBD_STREAM_INVALID' }
  const increment = { snapshot: 'three', from: 'two' }
  const printed = join(ceph.folder, 'increment')
  await writeFile(printed, await buffer(cluster.exportDiff(image, increment).stream))
  const print = `cat ${printed}`
  const full = { snapshot: 'three' }
  const says = (words: string) => `$(echo "$@" | sed '${words}')`
  const cases: [script: string, RbdExport, object][] = [
    [`${print}; echo "export-diff error: (5) Input/output error" >&2; exit 5`, increment, failed],
    [`${print} | head -c 100000; echo "(5) Input/output error" >&2; exit 1`, increment, failed],
    [`${print}; echo "rbd: export-diff error: (5) Input/output error" >&2`, increment, failed],
    [`${print} | head -c 100000`, increment, invalid],
    [`${print}; printf e`, increment, invalid],
    [`rbd ${says('s/=two/=one/')}`, increment, invalid],
    [`rbd ${says('s/--from-snap=two//')}`, increment, invalid],
    [`rbd ${says('s/--snap=three/--snap=two/; s/=two/=one/2')}`, increment, invalid],
    [`rbd "$@" --from-snap=one`, full, invalid],
  ]
  const folder = join(ceph.folder, 'in-front')
  await mkdir(folder)
  try {
    vi.stubEnv('PATH', `${folder}:${process.env.PATH}`)
    for (const [script, asked, error] of cases) {
      const path = `PATH=\${PATH#*:}`
      await writeFile(join(folder, 'rbd'), `#!/bin/sh\n${path}\n${script}\n`, { mode: 0o755 })
      const { stream, diff } = cluster.exportDiff(image, asked)
      await expect(buffer(stream), script).rejects.toMatchObject(error)
      expect(diff).toThrow()
    }
  } finally {
    vi.unstubAllEnvs()
  }
})

/** Snapshots of Varve's. */
const [ONE, TWO] = ['varve-20261127-101112-000-aaaaaa', 'varve-20261127-101112-000-bbbbbb'] as const

test('an image is removed with its snapshots, unless somebody else has an interest in one', async () => {
  const { cluster, ceph } = site
  const image = await site.create(MIB)
  for (const name of [ONE, TWO, 'varve-mine']) await ceph.client.createSnapshot(image, name)
  await expect(cluster.removeImage(image)).rejects.toMatchObject({
    code: 'RBD_FAILED',
    message: expect.stringContaining('varve-mine'),
  })
  await ceph.client.removeSnapshots(image, 'varve-mine')
  await ceph.run('rbd', 'snap', 'protect', `${image}@${TWO}`)
  const held = { code: 'RBD_SNAPSHOT_PROTECTED' }
  await expect(cluster.removeImage(image)).rejects.toMatchObject(held)
  await expect(cluster.removeSnapshots(image, [TWO])).rejects.toMatchObject(held)
  expect(await site.snapshots(image)).toEqual([ONE, TWO])
  await ceph.run('rbd', 'snap', 'unprotect', `${image}@${TWO}`)
  const clone = site.newImage()
  await ceph.run('rbd', 'clone', '--rbd-default-clone-format', '2', `${image}@${TWO}`, clone)
  await expect(cluster.removeImage(image)).rejects.toMatchObject({ ...held, context: { clone } })
  expect(await site.snapshots(image)).toEqual([ONE, TWO])
  await ceph.run('rbd', 'rm', '--no-progress', clone)
  await cluster.removeImage(image)
  expect(await ceph.client.list('vms')).not.toContain(image.replace('vms/', ''))
})

test('an image that somebody has open is neither rolled back nor removed', async () => {
  const { cluster, ceph } = site
  const image = await site.create(8 * MIB)
  await ceph.client.createSnapshot(image, ONE)
  expect(await cluster.isOpen(image)).toBe(false)
  // it takes the exclusive lock by its write, and keeps it until its input ends
  const holder = execa('qemu-io', ['-f', 'raw', `rbd:${image}:conf=${ceph.conf}`], { stdin: 'pipe' })
  try {
    // Not by its own iterable, which waits for its end when it is left.
    const answers = createInterface(holder.stdout)[Symbol.asyncIterator]()
    holder.stdin.write('write -P 1 0 4k\nflush\n')
    while (!(await answers.next()).value?.includes('wrote')) {
      // the prompts
    }
    expect(await cluster.isOpen(image)).toBe(true)
    await expect(cluster.rollback(image, ONE)).rejects.toMatchObject({ code: 'DISK_BUSY' })
    await expect(cluster.removeImage(image)).rejects.toMatchObject({ code: 'DISK_BUSY' })
    expect(await site.snapshots(image)).toEqual([ONE])
    await cluster.createSnapshot(image, TWO)
  } finally {
    holder.stdin.end()
    await holder
  }
  expect(await cluster.isOpen(image)).toBe(false)
  await cluster.removeImage(image)
})

/** The connection by the monitor's address and the key alone. */
function byKey(): CephOptions {
  const { ceph, user } = site
  return { conf: '/dev/null', user: user.user, key: user.secret, monitors: [ceph.monitor] }
}

test('a user is known by its key alone, which no command shows', async () => {
  const { user } = site
  const cluster = new CephConnector().cluster(byKey())
  const image = site.newImage()
  const events: VarveEvent[] = []
  const run = { onEvent: (event: VarveEvent) => events.push(event) }
  await cluster.createImage(image, { size: MIB }, run)
  await cluster.createSnapshot(image, 'one', run)
  await buffer(cluster.exportDiff(image, { snapshot: 'one' }, run).stream)
  expect(events).toHaveLength(3)
  expect(JSON.stringify(events)).not.toContain(user.secret)
  const error: Error = await cluster.rollback(image, 'two').catch(error => error)
  for (let cause: unknown = error; cause instanceof Error; cause = cause.cause)
    expect(JSON.stringify({ ...cause, message: cause.message, stack: cause.stack })).not.toContain(
      user.secret,
    )
})

test("QEMU's programs open an image by a name that holds no key, which is in a file in the given folder", async () => {
  const { ceph, user } = site
  await ceph.run('rbd', 'namespace', 'create', 'vms/qemu')
  const folder = join(ceph.folder, 'key')
  await mkdir(folder)
  const byKeyring = { conf: ceph.conf, user: user.user, keyring: user.keyring }
  for (const [image, options] of [
    ['vms/q:1=a', byKeyring],
    ['vms/qemu/q\\2 x', byKey()],
  ] as const) {
    const cluster = new CephConnector(options).cluster()
    await cluster.createImage(image, { size: 3 * MIB })
    const fileName = await cluster.fileName(image, folder)
    expect(fileName).not.toContain(user.secret)
    const keyring = /keyring=([^:]*)/.exec(fileName)?.[1]?.replaceAll('\\', '') ?? ''
    expect(keyring).toBe('key' in options ? join(folder, 'keyring') : user.keyring)
    expect((await stat(keyring)).mode & 0o077).toBe(0)
    expect(await readFile(keyring, 'utf8')).toContain(user.secret)
    const { stdout } = await execa('qemu-img', ['info', '-f', 'raw', '--output=json', fileName])
    expect(JSON.parse(stdout)).toMatchObject({ 'virtual-size': 3 * MIB })
  }
})

test('a user that is not known, has another key or no rights is told from a missing pool', async () => {
  const { ceph, user } = site
  const { conf } = ceph
  const reader = await ceph.createUser('reader', 'profile rbd-read-only')
  const stranger = await ceph.createUser('stranger', 'profile rbd pool=another')
  const image = await site.create(MIB)
  const ask = (options: CephOptions) => new CephConnector({ conf, ...options }).cluster().isOpen(image)
  const denied = { code: 'CEPH_ACCESS_DENIED', retryable: false }
  await expect(ask({ user: 'nobody', keyring: user.keyring })).rejects.toMatchObject(denied)
  await expect(ask({ user: 'varve', key: stranger.secret })).rejects.toMatchObject(denied)
  await expect(ask({ user: 'varve', keyring: '/nonexistent' })).rejects.toMatchObject(denied)
  await expect(ask({ user: 'stranger', keyring: stranger.keyring })).rejects.toMatchObject(denied)
  const reading = new CephConnector({ conf, user: 'reader', keyring: reader.keyring }).cluster()
  await expect(reading.createSnapshot(image, 'one')).rejects.toMatchObject(denied)
  expect(await reading.isOpen(image)).toBe(false)
  await expect(site.cluster.image('nowhere/x')).rejects.toMatchObject({ code: 'CEPH_POOL_NOT_FOUND' })
})

test('a configuration that is not there, or names no monitor, is told of', async () => {
  for (const conf of ['/nonexistent/ceph.conf', '/dev/null']) {
    const asked = new CephConnector({ conf }).cluster().image('vms/x')
    await expect(asked).rejects.toMatchObject({ code: 'INVALID_CONFIG' })
  }
})

test('a cluster that hangs, or is not there, ends every command in its time', async () => {
  const { ceph, user } = site
  const { conf } = ceph
  // More than the ten objects that rbd reads ahead.
  const image = await site.create(64 * MIB)
  await site.write(image, 'write -P 1 0 64M')
  await ceph.client.createSnapshot(image, 'one')
  const options = { conf, user: user.user, keyring: user.keyring, timeoutMs: 2_000 }
  const cluster = new CephConnector(options).cluster()
  const unreachable = { code: 'CEPH_UNREACHABLE', retryable: true }
  const { stream } = cluster.exportDiff(image, { snapshot: 'one' })
  try {
    const reading = (async () => {
      for await (const _ of stream) await ceph.pause()
    })()
    await expect(reading).rejects.toMatchObject(unreachable)
    const nowhere = new CephConnector({ conf, monitors: ['127.0.0.1:1'], timeoutMs: 1_000 }).cluster()
    await Promise.all([
      expect(cluster.isOpen(image)).rejects.toMatchObject(unreachable),
      expect(cluster.createSnapshot(image, 'two')).rejects.toMatchObject(unreachable),
      expect(nowhere.snapshots(image)).rejects.toMatchObject(unreachable),
    ])
  } finally {
    ceph.resume()
  }
  expect(await site.cluster.image(image)).toMatchObject({ size: 64 * MIB })
})

test('names that rbd would take apart are refused before anything is run', async () => {
  const { cluster } = site
  const events: VarveEvent[] = []
  const run = { onEvent: (event: VarveEvent) => events.push(event) }
  const calls = [
    () => cluster.image('vms/a@b', run),
    () => cluster.image('vms', run),
    () => cluster.createSnapshot('vms/a', 'a@b', run),
    () => cluster.renameImage('vms/a', 'vms/a@b', run),
    async () => cluster.exportDiff('vms/a', { snapshot: 'a', from: 'a/b' }, run),
  ]
  for (const call of calls) await expect(call()).rejects.toMatchObject({ code: 'INVALID_ARGUMENT' })
  expect(events).toEqual([])
})
