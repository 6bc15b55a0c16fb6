import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, expect, onTestFinished, test, vi } from 'vitest'
import { fileOfName, headerChain } from '../src/backing-chain.ts'
import { readDefinedBacking } from '../src/defined-backing.ts'

afterEach(() => void vi.unstubAllEnvs())

test('a look at the headers that was given up, or lacks its program, does not blame the disk', async () => {
  const reason = new Error('no longer wanted')
  const givenUp = headerChain('/img/a', 'qcow2', { signal: AbortSignal.abort(reason) })
  await expect(givenUp).rejects.toMatchObject({ code: 'ABORTED', cause: reason })
  vi.stubEnv('PATH', '/nowhere')
  await expect(headerChain('/img/a', 'qcow2', {})).rejects.toMatchObject({ code: 'COMMAND_MISSING' })
})

test('a header that names no backing file is enough, and whatever else is there is looked at by qemu-img', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-header-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  vi.stubEnv('PATH', '/nowhere')
  const path = join(folder, 'image')
  const chainOf = async (header: Buffer, format = 'qcow2') => {
    await writeFile(path, header)
    return headerChain(path, format, {})
  }
  const headerOf = (version: number, backing: bigint, magic = 0x514649fb) => {
    const header = Buffer.alloc(104)
    header.writeUInt32BE(magic, 0)
    header.writeUInt32BE(version, 4)
    header.writeBigUInt64BE(backing, 8)
    return header
  }
  expect(await chainOf(headerOf(3, 0n))).toEqual([])
  expect(await chainOf(headerOf(2, 0n))).toEqual([])
  const asked = { code: 'COMMAND_MISSING' }
  for (const other of [
    headerOf(3, 1n),
    headerOf(2, 1n << 63n),
    headerOf(1, 0n), // of qcow2's forerunner
    headerOf(4, 0n),
    headerOf(3, 0n, 0x514649fa),
    headerOf(3, 0n).subarray(0, 15),
    Buffer.alloc(0),
  ])
    await expect(chainOf(other)).rejects.toMatchObject(asked)
  await expect(chainOf(headerOf(3, 0n), 'raw')).rejects.toMatchObject(asked)
  await expect(headerChain(folder, 'qcow2', {})).rejects.toMatchObject(asked)
})

test('the file of a node is told from the name that QEMU gives it', () => {
  const json = (node: object) => `json:${JSON.stringify(node)}`
  const file = { driver: 'file', filename: '/img/a' }
  const other = { driver: 'qcow2', file: { driver: 'file', filename: '/img/b' } }
  const qcow2 = { driver: 'qcow2', file }
  for (const [name, wanted] of [
    ['/img/a', '/img/a'],
    ['nbd://host:10809/a', 'nbd://host:10809/a'],
    [json({ backing: other, ...qcow2 }), '/img/a'],
    [json({ backing: null, ...qcow2 }), '/img/a'],
    [json({ driver: 'copy-on-read', file: { backing: other, ...qcow2 } }), '/img/a'],
    [json({ driver: 'qcow2', file: { driver: 'host_device', filename: '/dev/sdb' } }), '/dev/sdb'],
  ] as const)
    expect(fileOfName(name)).toBe(wanted)
  // A part of a file, what is no file, and what QEMU has cut off, are no file of their own.
  for (const name of [
    json({ driver: 'raw', offset: 0, size: 512, file }),
    json({ driver: 'qcow2', file: { driver: 'raw', offset: 512, file } }),
    json({ driver: 'raw', file: { driver: 'iscsi', portal: 'p', target: 't', lun: '1' } }),
    json({ driver: 'raw', offset: 0, file: { driver: 'rbd', pool: 'p', image: 'i' } }),
    json(qcow2).slice(0, -9),
    'json:[]',
  ])
    expect(fileOfName(name)).toBe(name)
})

test('an RBD image is told by its place and its cluster, and not by how much QEMU says of it', () => {
  const name = (node: object) =>
    fileOfName(
      `json:${JSON.stringify({ driver: 'raw', file: { driver: 'rbd', pool: 'p', image: 'i', ...node } })}`,
    )
  expect(name({})).toBe('rbd:p/i')
  expect(name({ namespace: '', conf: '/c', user: 'x', 'key-secret': 'k' })).toBe('rbd:p/i:conf=/c')
  const [one, other] = [
    { host: 'a', port: '6789' },
    { host: 'b', port: '3300' },
  ]
  expect(name({ server: [other, one] })).toBe(name({ user: 'x', server: [one, other] }))
  const all = [{}, { namespace: 'n' }, { snapshot: 's' }, { conf: '/c' }, { conf: '/d' }, { server: [one] }]
  expect(new Set([...all, { pool: 'q' }, { image: 'j' }].map(name)).size).toBe(8)
})

test('the backing files of a definition are read down to where they end, and those of the right disk', () => {
  const backingOf = (backingStore: string) =>
    readDefinedBacking(
      `<domain><devices>
        <disk type='file'><source file='/a'/><backingStore/><target dev='vda'/></disk>
        <disk type='file'><source file='/b'/>${backingStore}<target dev='vdb'/></disk>
      </devices></domain>`,
      'vdb',
    )
  const file = (path: string, below = '') =>
    `<backingStore type='file'><format type='qcow2'/><source file='${path}'/>${below}</backingStore>`
  const image = (source: string) => ({ type: 'file', format: 'qcow2', source, sliced: false })
  expect(backingOf('')).toEqual({ images: [], ended: false })
  expect(backingOf('<backingStore/>')).toEqual({ images: [], ended: true })
  expect(backingOf(file('/c'))).toEqual({ images: [image('/c')], ended: false })
  expect(backingOf(file('/c', file('/d', '<backingStore/>')))).toEqual({
    images: [image('/c'), image('/d')],
    ended: true,
  })
  const nbd = (source: string) =>
    backingOf(`<backingStore type='network'><format type='raw'/>${source}</backingStore>`).images[0]?.nbd
  expect(nbd("<source protocol='nbd' name='x'><host name='h'/></source>")).toBe('nbd://h:10809/x')
  expect(nbd("<source protocol='nbd'><host name='h' port='1'/></source>")).toBe('nbd://h:1')
  expect(nbd("<source protocol='nbd' name='x'><host transport='unix' socket='/s'/></source>")).toBe(
    'nbd+unix:///x?socket=/s',
  )
  expect(nbd("<source protocol='rbd' name='p/x'/>")).toBeUndefined()
})
