import { readFileSync } from 'node:fs'
import { posix } from 'node:path'
import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { isVarveError, type VarveError } from '../src/errors.ts'
import { type BackupManifest, manifestJsonSchema, parseManifest, serializeManifest } from '../src/manifest.ts'
import { assertKey } from '../src/storage.ts'
import { instanceFolder } from '../src/storage-layout.ts'
import { anyManifest, mangledManifest } from './manifest-arbitrary.ts'

const FULL = '20261123-231543-123-9f3a1c'
const FIRST = '20261124-231543-123-77aa01'
const SECOND = '20261125-231543-123-77aa02'
const HASH = '0123456789abcdef'.repeat(4)

function keyOf({ instance, chain, id }: Pick<BackupManifest, 'instance' | 'chain' | 'id'>): string {
  return `${instanceFolder(instance.name)}/${chain}/${id}/manifest.json`
}

/** An increment as the writer makes it, as plain JSON that a test breaks. */
function incremental() {
  return {
    version: 1,
    id: SECOND,
    chain: FULL,
    parent: FIRST,
    kind: 'incremental',
    instance: { name: 'web-1', uuid: '0c8ad1fc-4a1e-4c57-9c52-9a3f5a1b2c3d' },
    startedAt: '2026-11-25T23:15:43.123Z',
    frozenAt: '2026-11-25T23:15:44.000Z',
    finishedAt: '2026-11-25T23:20:00.000Z',
    consistency: 'crash',
    running: true,
    disks: [
      {
        name: 'vda',
        kind: 'incremental',
        image: 'vda.qcow2',
        blocks: 'vda.blake3',
        format: 'qcow2',
        virtualSize: 8_589_934_592,
        storedSize: 1_376_256,
        clusterSize: 65_536,
        digest: { root: HASH, blockSize: 4_194_304 },
        backing: `../${FIRST}/vda.qcow2`,
        bitmap: { name: `varve-${SECOND}`, granularity: 65_536 },
        source: { path: '/var/lib/libvirt/images/web-1.qcow2', format: 'qcow2' },
      },
      {
        name: 'vdb',
        kind: 'full',
        image: 'vdb.qcow2',
        blocks: 'vdb.blake3',
        format: 'qcow2',
        virtualSize: 1_073_741_824,
        storedSize: 327_680,
        clusterSize: 65_536,
        digest: { root: HASH, blockSize: 4_194_304 },
        fallback: 'format-raw',
        source: { path: '/dev/vg/data', format: 'raw' },
      },
    ],
    definition: { key: 'domain.xml', size: 5000, blake3: HASH },
    nvram: { key: 'nvram.fd', size: 131_072, blake3: HASH },
    tools: { varve: '0.1.0', qemu: '7.2.0' },
  }
}

function full() {
  const { parent: _, disks, ...rest } = incremental()
  const { backing: _backing, ...vda } = disks[0] ?? {}
  return {
    ...rest,
    id: FULL,
    kind: 'full',
    disks: [{ ...vda, kind: 'full', bitmap: { name: `varve-${FULL}`, granularity: 65_536 } }],
  }
}

/** Sets or, with undefined, removes a field such as `disks.0.name`. */
function withField(json: object, path: string, value: unknown): object {
  const changed = structuredClone(json)
  const names = path.split('.')
  const last = names.pop() ?? ''
  let holder: object = changed
  for (const name of names) holder = Reflect.get(holder, name)
  if (value === undefined) Reflect.deleteProperty(holder, last)
  else Reflect.set(holder, last, value)
  return changed
}

function parse(json: object | string, key = keyOf({ instance: { name: 'web-1' }, chain: FULL, id: SECOND })) {
  return parseManifest(Buffer.from(typeof json === 'string' ? json : JSON.stringify(json)), { key })
}

function refusal(action: () => unknown): VarveError {
  try {
    action()
  } catch (error) {
    if (isVarveError(error)) return error
    throw error
  }
  throw new Error('it was accepted')
}

const fullKey = keyOf({ instance: { name: 'web-1' }, chain: FULL, id: FULL })

describe('a manifest', () => {
  it('is read as it was written', () => {
    expect(parse(incremental())).toEqual(incremental())
    expect(parse(full(), fullKey)).toEqual(full())
  })

  it('comes back from its own bytes, whatever is in it', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(anyManifest, manifest => {
        const bytes = serializeManifest(manifest)
        expect(parseManifest(bytes, { key: keyOf(manifest) })).toEqual(manifest)
        expect(JSON.parse(Buffer.from(bytes).toString())).toEqual(manifest)
      }),
      { numRuns: 100 },
    )
  })

  it('has the same bytes in whatever order its fields were set', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(anyManifest, manifest => {
        const backwards = Object.fromEntries(Object.entries(manifest).reverse()) as unknown as BackupManifest
        expect(serializeManifest(backwards)).toEqual(serializeManifest(manifest))
      }),
    )
  })

  it('may have fields of a later minor version, which are dropped', () => {
    const json = incremental()
    const later = withField(withField(json, 'extra', { a: 1 }), 'disks.0.digest.extra', [1])
    expect(parse(later)).toEqual(json)
  })

  it('of a newer version is told apart, with the remedy', () => {
    const error = refusal(() => parse({ version: 2, everything: 'else' }))
    expect(error).toMatchObject({ code: 'MANIFEST_VERSION', context: { version: 2 } })
    expect(error.message).toContain('Upgrade Varve')
  })

  it.each([
    'not json',
    '',
    'null',
    '[]',
    '{}',
    '7',
    '"x"',
    '['.repeat(100_000),
    '{"version":1}',
    '{"version":0}',
    '{"version":"2"}',
    '{"version":1.5}',
  ])('is refused when it is %j', text => {
    expect(refusal(() => parse(text)).code).toBe('MANIFEST_INVALID')
  })

  it('is refused when it is no UTF-8', () => {
    const bytes = Buffer.from(JSON.stringify(incremental()).replace('/dev/vg/data', '/dev/\u00ff'), 'latin1')
    expect(refusal(() => parseManifest(bytes, { key: keyOf(parse(incremental())) })).code).toBe(
      'MANIFEST_INVALID',
    )
  })

  it('is refused above 1 MiB, without being parsed', () => {
    const error = refusal(() => parse(JSON.stringify(incremental()) + ' '.repeat(1024 * 1024)))
    expect(error).toMatchObject({ code: 'MANIFEST_INVALID', context: { field: 'size' } })
  })

  it.each<[field: string, value: unknown, reportedAs?: string]>([
    ['version', undefined],
    ['id', '../../etc'],
    ['id', '20261126-231543-123-77aa02', 'disks.0.bitmap.name'],
    ['id', '20261345-231543-123-77aa02'],
    ['chain', '..'],
    ['chain', FIRST],
    ['chain', SECOND],
    ['parent', undefined],
    ['parent', ''],
    ['parent', '../x'],
    ['parent', SECOND],
    ['parent', '20271124-231543-123-77aa01'],
    ['parent', '20251124-231543-123-77aa01', 'chain'],
    ['kind', 'full', 'parent'],
    ['kind', 'differential'],
    ['instance.name', ''],
    ['instance.name', 'x'.repeat(81)],
    ['instance.name', 'web-2'],
    ['instance.name', 'web-1\n'],
    ['instance.uuid', 'no'],
    ['startedAt', '25 Nov 2026'],
    ['startedAt', '2026-11-25T23:15:43.123+01:00'],
    ['frozenAt', '2026-02-30T00:00:00.000Z'],
    ['frozenAt', undefined],
    ['finishedAt', 1],
    ['consistency', 'application'],
    ['running', 'yes'],
    ['disks', []],
    ['disks', undefined],
    ['disks.0.name', ''],
    ['disks.0.name', '..'],
    ['disks.0.name', 'vda/x'],
    ['disks.0.name', 'v'.repeat(65)],
    ['disks.0.name', 'vdb', 'disks.1.name'],
    ['disks.0.kind', 'full', 'disks'],
    ['disks.0.image', '../vda.qcow2'],
    ['disks.0.image', 'sub/vda.qcow2'],
    ['disks.0.image', '/vda.qcow2'],
    ['disks.0.image', '.vda.qcow2'],
    ['disks.0.image', '-vda.qcow2'],
    ['disks.0.image', 'vda.qcow2\n'],
    ['disks.0.image', 'v'.repeat(129)],
    ['disks.0.image', 'manifest.json'],
    ['disks.0.image', 'vda.blake3', 'disks.0.blocks'],
    ['disks.0.image', 'vdb.qcow2', 'disks.1.image'],
    ['disks.0.blocks', 'a b'],
    ['disks.0.blocks', 'vdb.blake3', 'disks.1.blocks'],
    ['disks.0.format', 'raw'],
    ['disks.0.virtualSize', -1],
    ['disks.0.virtualSize', 1.5],
    ['disks.0.virtualSize', 2 ** 53],
    ['disks.0.virtualSize', '8589934592'],
    ['disks.0.storedSize', -1],
    ['disks.0.storedSize', null],
    ['disks.0.storedSize', 2 ** 53 - 1, 'disks.0.digest.blockSize'],
    ['disks.0.map', { key: 'vda.map', size: 2 ** 25 + 1, blake3: HASH }, 'disks.0.map.size'],
    ['disks.0.clusterSize', 65_537],
    ['disks.0.clusterSize', 2048],
    ['disks.0.clusterSize', 4_194_304],
    ['disks.0.digest.root', HASH.toUpperCase()],
    ['disks.0.digest.root', HASH.slice(1)],
    ['disks.0.digest.blockSize', 0],
    ['disks.0.digest.blockSize', 32_768],
    ['disks.0.digest.blockSize', 4_194_303],
    ['disks.0.digest.blockSize', 2 ** 27],
    ['disks.0.backing', undefined],
    ['disks.0.backing', `../${FULL}/vda.qcow2`],
    ['disks.0.backing', `../${FIRST}/`],
    ['disks.0.backing', `../${FIRST}/../vda.qcow2`],
    ['disks.0.backing', `../${FIRST}/sub/vda.qcow2`],
    ['disks.0.backing', '/etc/passwd'],
    ['disks.0.backing', `json:{"file.filename":"../${FIRST}/vda.qcow2"}`],
    ['disks.1.backing', `../${FIRST}/vdb.qcow2`],
    ['disks.0.bitmap.name', `varve-${FIRST}`],
    ['disks.0.bitmap.granularity', 1000],
    ['disks.0.bitmap.granularity', 256],
    ['disks.0.fallback', 'disk-new'],
    ['disks.1.fallback', 'bad-weather'],
    ['disks.0.source', undefined],
    ['disks.0.source.path', ''],
    ['disks.0.source.format', 'vmdk'],
    ['definition.key', '../domain.xml'],
    ['definition.key', 'vda.qcow2'],
    ['definition.size', -1],
    ['definition.size', 1024 * 1024 + 1],
    ['nvram.size', 256 * 1024 * 1024 + 1],
    ['definition.blake3', 'x'],
    ['nvram.key', 'domain.xml'],
    ['tools', undefined],
    ['tools.qemu', 7],
  ])('is refused with %s %j', (field, value, reportedAs = field) => {
    const error = refusal(() => parse(withField(incremental(), field, value)))
    expect(error).toMatchObject({ code: 'MANIFEST_INVALID', context: { field: reportedAs } })
    expect(error.message).toContain(reportedAs)
  })

  it.each<[field: string, value: unknown, reportedAs?: string]>([
    ['chain', '20251124-231543-123-77aa01'],
    ['parent', '20251124-231543-123-77aa01'],
    ['kind', 'incremental', 'parent'],
    ['disks.0.kind', 'incremental'],
    ['disks.0.backing', `../${FIRST}/vda.qcow2`],
  ])('of a full backup is refused with %s %j', (field, value, reportedAs = field) => {
    const error = refusal(() => parse(withField(full(), field, value), fullKey))
    expect(error).toMatchObject({ code: 'MANIFEST_INVALID', context: { field: reportedAs } })
  })

  it('of a full backup is refused in the chain of another one', () => {
    const chain = '20251124-231543-123-77aa01'
    const key = keyOf({ instance: { name: 'web-1' }, chain, id: FULL })
    expect(refusal(() => parse({ ...full(), chain }, key))).toMatchObject({
      code: 'MANIFEST_INVALID',
      context: { field: 'chain' },
    })
  })

  it('of an increment is refused without an incremental disk', () => {
    const json = incremental()
    const error = refusal(() => parse({ ...json, disks: json.disks.slice(1) }))
    expect(error.context.field).toBe('disks')
  })

  it.each([
    [keyOf({ instance: { name: 'web-2' }, chain: FULL, id: SECOND }), 'instance.name'],
    [keyOf({ instance: { name: 'web-1' }, chain: FIRST, id: SECOND }), 'chain'],
    [keyOf({ instance: { name: 'web-1' }, chain: FULL, id: FIRST }), 'id'],
    ['manifest.json', 'key'],
    ['', 'key'],
    ['../x/y/manifest.json', 'key'],
  ])('is refused where it was found at %j', (key, field) => {
    expect(refusal(() => parse(incremental(), key))).toMatchObject({
      code: 'MANIFEST_INVALID',
      context: { key, field },
    })
  })

  it('that its own reader would refuse is never written', () => {
    const broken = withField(incremental(), 'disks.0.virtualSize', -1) as unknown as BackupManifest
    expect(refusal(() => serializeManifest(broken)).code).toBe('MANIFEST_INVALID')
  })

  it('however mangled, is either refused with a VarveError or safe to use', {
    timeout: FUZZ_TIMEOUT_MS,
  }, () => {
    fc.assert(
      fc.property(mangledManifest, ({ manifest, bytes }) => {
        let parsed: BackupManifest
        try {
          parsed = parseManifest(bytes, { key: keyOf(manifest) })
        } catch (error) {
          if (!isVarveError(error)) throw error
          expect(['MANIFEST_INVALID', 'MANIFEST_VERSION']).toContain(error.code)
          return
        }
        expectSafe(parsed)
        expect(keyOf(parsed)).toBe(keyOf(manifest))
      }),
      fuzz(300),
    )
  })
})

/** What code that uses a manifest relies on, said in other words than the schema does. */
function expectSafe(manifest: BackupManifest): void {
  const folder = keyOf(manifest).replace(/\/manifest.json$/, '')
  const files = [
    ...manifest.disks.flatMap(({ image, blocks }) => [image, blocks]),
    ...[manifest.definition, manifest.nvram].flatMap(file => (file ? [file.key] : [])),
  ]
  for (const name of files) {
    assertKey(`${folder}/${name}`)
    expect(name.split('/')).toHaveLength(1)
  }
  expect(new Set(files).size).toBe(files.length)
  expect(new Set(manifest.disks.map(({ name }) => name)).size).toBe(manifest.disks.length)
  expect(manifest.kind === 'full').toBe(manifest.parent === undefined)
  for (const disk of manifest.disks) {
    expect(Math.abs(Math.trunc(disk.storedSize))).toBe(disk.storedSize)
    expect(Math.abs(Math.trunc(disk.virtualSize))).toBe(disk.virtualSize)
    expect(new Date(manifest.frozenAt).getTime()).not.toBeNaN()
    if (disk.kind === 'full') {
      expect(disk.backing).toBeUndefined()
      continue
    }
    expect(manifest.kind).toBe('incremental')
    // Where the backing file name leads to from the folder of the image. Not by `new URL`: the folder of
    // an instance called `.` is `%2E`, which a URL takes for a dot.
    const [, chain, parent, file] = posix.join(folder, disk.backing ?? '').split('/')
    expect([chain, parent]).toEqual([manifest.chain, manifest.parent])
    expect(file).toMatch(/^\w/)
  }
}

describe("the manifest's JSON schema", () => {
  it('is the one in the package: run `npm run schema` after a change', () => {
    const shipped = readFileSync(new URL('../schema/manifest.v1.json', import.meta.url), 'utf8')
    expect(JSON.parse(shipped)).toEqual(manifestJsonSchema())
  })

  it('has every field, and every word that one may hold, described in docs/storage-format.md', () => {
    const format = readFileSync(new URL('../../../docs/storage-format.md', import.meta.url), 'utf8')
    const described = new Set(format.match(/`[\w.-]+`/g)?.flatMap(word => word.slice(1, -1).split('.')))
    const fields = wordsIn(manifestJsonSchema())
    expect(fields.size).toBeGreaterThan(45)
    expect([...fields].filter(field => !described.has(field))).toEqual([])
  })
})

function wordsIn(schema: unknown): Set<string> {
  if (typeof schema !== 'object' || schema === null) return new Set()
  const properties = 'properties' in schema && typeof schema.properties === 'object' ? schema.properties : {}
  const words: unknown[] = 'enum' in schema && Array.isArray(schema.enum) ? schema.enum : []
  return new Set([
    ...Object.keys(properties ?? {}),
    ...words.filter(word => typeof word === 'string'),
    ...Object.values(schema).flatMap(part => [...wordsIn(part)]),
  ])
}
