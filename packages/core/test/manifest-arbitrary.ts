import fc from 'fast-check'
import { expect } from 'vitest'
import type { BackupManifest, FallbackReason, ManifestDisk } from '../src/manifest.ts'
import { instanceFolder } from '../src/storage-layout.ts'

const hex = (length: number) =>
  fc.string({ unit: fc.constantFrom(...'0123456789abcdef'), minLength: length, maxLength: length })

const byteCount = fc.oneof(fc.nat(), fc.maxSafeNat())
const clusterSize = fc.integer({ min: 12, max: 21 }).map(bits => 2 ** bits)
const granularity = fc.integer({ min: 9, max: 31 }).map(bits => 2 ** bits)
const isoTime = fc
  .date({ min: new Date('0001-01-01'), max: new Date('9999-12-31'), noInvalidDate: true })
  .map(date => date.toISOString())
const fallback = fc.constantFrom<FallbackReason>(
  'no-parent',
  'chain-limit',
  'parent-broken',
  'disk-new',
  'disk-replaced',
  'disk-shrunk',
  'format-raw',
  'bitmap-missing',
  'bitmap-inconsistent',
  'bitmap-disabled',
  'bitmap-granularity',
  'bitmap-altered',
  'snapshot-missing',
  'snapshot-replaced',
)

const disk = fc.record(
  {
    incremental: fc.boolean(),
    fields: fc.record({
      virtualSize: byteCount,
      storedSize: fc.oneof(fc.nat(), fc.integer({ min: 0, max: 2 ** 41 })), // of a list that is not too long
      clusterSize,
      digest: fc.record({
        root: hex(64),
        blockSize: fc.integer({ min: 16, max: 26 }).map(bits => 2 ** bits),
      }),
      source: fc.record({
        path: fc.string({ unit: 'binary', minLength: 1, maxLength: 30 }),
        format: fc.constantFrom('qcow2' as const, 'raw' as const),
      }),
    }),
    granularity,
    fallback,
    rbd: fc.record({
      index: fc.record({ size: fc.nat({ max: 1_000_000 }), blake3: hex(64) }),
      snapshotId: fc.nat(),
      source: fc.record({
        path: fc.constantFrom('rbd/vda', 'pool/ns/an image.1'),
        format: fc.constant('rbd' as const),
        imageId: fc.stringMatching(/^[0-9a-f]{1,20}$/),
      }),
    }),
  },
  { requiredKeys: ['incremental', 'fields'] },
)

const diskNames = fc.uniqueArray(fc.stringMatching(/^[A-Za-z0-9_][A-Za-z0-9_-]{0,9}$/), {
  minLength: 1,
  maxLength: 3,
})

const file = (key: string) =>
  fc.record({ key: fc.constant(key), size: fc.nat({ max: 1_000_000 }), blake3: hex(64) })

const rest = fc.record(
  {
    instance: fc.record(
      {
        name: fc.string({ unit: 'grapheme', minLength: 1, maxLength: 10 }).filter(isInstanceName),
        uuid: fc.uuid(),
      },
      { requiredKeys: ['name'] },
    ),
    startedAt: isoTime,
    frozenAt: isoTime,
    finishedAt: isoTime,
    consistency: fc.constantFrom('crash' as const, 'filesystem' as const, 'offline' as const),
    running: fc.boolean(),
    definition: file('domain.xml'),
    nvram: file('nvram.fd'),
    tools: fc.dictionary(fc.stringMatching(/^[a-z-]{1,10}$/), fc.string({ maxLength: 20 })),
  },
  {
    requiredKeys: ['instance', 'startedAt', 'frozenAt', 'finishedAt', 'consistency', 'running', 'tools'],
  },
)

const FIRST_DAY = Date.parse('2026-01-01T00:00:00Z')

/** An id of so many days after the first one. */
function idAfter(days: number, tail: string): string {
  const day = new Date(FIRST_DAY + days * 86_400_000).toISOString().slice(0, 10)
  return `${day.replaceAll('-', '')}-120000-000-${tail}`
}

/** Any valid manifest, with every optional field now there and now not. */
export const anyManifest: fc.Arbitrary<BackupManifest> = fc
  .record({
    days: fc.tuple(fc.nat({ max: 400 }), fc.integer({ min: 1, max: 400 })),
    tail: hex(6),
    incremental: fc.boolean(),
    names: diskNames,
    disks: fc.array(disk, { minLength: 3, maxLength: 3 }),
    rest,
  })
  .map(({ days: [first, second], tail, incremental, names, disks, rest }) => {
    const chain = idAfter(0, tail)
    const parent = idAfter(first, tail) // after no days: the full backup itself
    const id = incremental ? idAfter(first + second, tail) : chain
    return {
      version: 1,
      id,
      chain,
      ...(incremental && { parent }),
      kind: incremental ? 'incremental' : 'full',
      disks: names.map((name, i): ManifestDisk => {
        const { fields, granularity, fallback, rbd, ...any } = disks[i] ?? expect.fail()
        const kind = incremental && (i === 0 || any.incremental) ? 'incremental' : 'full'
        const image = `${name}.${rbd ? 'rbd-diff' : 'qcow2'}`
        const common = {
          name,
          kind,
          image,
          blocks: `${name}.blake3`,
          ...(kind === 'incremental' && { backing: `../${parent}/${image}` }),
          ...(kind === 'full' && fallback !== undefined && { fallback }),
        } as const
        if (rbd) {
          const { virtualSize, storedSize, digest } = fields
          return {
            ...common,
            format: 'rbd-diff',
            virtualSize,
            storedSize,
            digest,
            index: { key: `${name}.index`, ...rbd.index },
            snapshot: { name: `varve-${id}`, id: rbd.snapshotId },
            source: rbd.source,
          }
        }
        return {
          ...common,
          format: 'qcow2',
          ...fields,
          ...(granularity !== undefined && { bitmap: { name: `varve-${id}`, granularity } }),
        }
      }),
      ...rest,
    }
  })

function isInstanceName(name: string): boolean {
  try {
    instanceFolder(name)
    return true
  } catch {
    return false
  }
}

/** Any JSON value, among them ones that look like parts of a manifest. */
const anyJson = fc.oneof(
  fc.constantFrom<unknown>(
    null,
    true,
    0,
    -1,
    1.5,
    1e300,
    2,
    '',
    '..',
    '../x',
    'manifest.json',
    [],
    {},
    'full',
  ),
  fc.jsonValue({ maxDepth: 2 }),
)

/** A manifest with some of its parts replaced, removed or added to; also what is hardly one any more. */
export const mangledManifest: fc.Arbitrary<{ manifest: BackupManifest; bytes: Uint8Array }> = fc
  .tuple(
    anyManifest,
    fc.array(fc.tuple(fc.nat(), fc.constantFrom('replace', 'remove', 'add', 'copy'), anyJson, fc.nat()), {
      maxLength: 3,
    }),
    fc.array(fc.tuple(fc.nat(), fc.nat({ max: 255 })), { maxLength: 2 }),
    fc.option(fc.nat(), { freq: 5 }),
  )
  .map(([manifest, changes, bytes, cut]) => {
    const json: unknown = structuredClone(manifest)
    for (const [where, how, value, other] of changes) changeSomewhere(json, where, how, value, other)
    let text = Buffer.from(JSON.stringify(json))
    for (const [at, byte] of bytes) text[at % text.length] = byte
    if (cut !== null) text = text.subarray(0, cut % text.length)
    return { manifest, bytes: text }
  })

function changeSomewhere(json: unknown, where: number, how: string, value: unknown, other: number): void {
  const places = placesIn(json)
  const place = places[where % places.length]
  if (!place) return
  if (how === 'remove') Reflect.deleteProperty(place.holder, place.key)
  if (how === 'replace') Reflect.set(place.holder, place.key, value)
  if (how === 'add') Reflect.set(place.holder, 'extra', value)
  if (how === 'copy')
    Reflect.set(place.holder, place.key, structuredClone(places[other % places.length]?.value))
}

interface Place {
  holder: object
  key: string
  value: unknown
}

function placesIn(json: unknown): Place[] {
  if (typeof json !== 'object' || json === null) return []
  return Object.entries(json).flatMap(([key, value]) => [{ holder: json, key, value }, ...placesIn(value)])
}
