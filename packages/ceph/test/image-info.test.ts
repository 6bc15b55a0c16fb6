import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import {
  parseClones,
  parseInfo,
  parseMetadata,
  parseNames,
  parseSnapshots,
  parseWatchers,
} from '../src/image-info.ts'

// As rbd 17.2 prints them.
const INFO = {
  ...{ name: 'web-1', id: '1f0a', size: 4194304, objects: 4, order: 20, object_size: 1048576 },
  ...{ features: ['layering', 'object-map'], flags: ['object map invalid'], data_pool: 'data' },
  ...{ stripe_unit: 65536, stripe_count: 4, mirroring: { mode: 'journal' } },
}
const SNAPSHOTS = [{ id: 4, name: 'varve-1', size: 4194304, protected: 'false', timestamp: 'Sat Nov 28' }]
const PARSERS = [
  [parseInfo, INFO],
  [parseSnapshots, SNAPSHOTS],
  [parseMetadata, { 'varve.restored.1.vda': 'varve-1' }],
  [parseNames, ['web-1', 'web-2']],
  [
    parseClones,
    [
      { pool: 'vms', pool_namespace: 'a', image: 'web-2' },
      { pool: 'vms', image: 'web-3' },
    ],
  ],
  [parseWatchers, { watchers: [{ address: '10.0.0.1:0/1', client: 4123, cookie: 1 }] }],
] as const

test('what rbd prints of an image, its snapshots and who uses it is understood', () => {
  expect(PARSERS.map(([parse, printed]) => parse(JSON.stringify(printed)))).toEqual([
    {
      id: '1f0a',
      size: 4194304,
      flags: ['object map invalid'],
      mirrored: true,
      layout: {
        features: ['layering', 'object-map'],
        objectSize: 1048576,
        striping: { unit: 65536, count: 4 },
        dataPool: 'data',
      },
    },
    [{ name: 'varve-1', id: 4, protected: false }],
    new Map([['varve.restored.1.vda', 'varve-1']]),
    ['web-1', 'web-2'],
    ['vms/a/web-2', 'vms/web-3'],
    1,
  ])
})

test(
  'what is mangled of it is understood or RBD_FAILED',
  () => {
    const odd = fc.oneof(fc.jsonValue(), fc.constantFrom<unknown>(-1, 0.5, 2 ** 60, '', '__proto__', null))
    const mangled = fc.constantFrom(...PARSERS).chain(([parse, printed]) => {
      const text = JSON.stringify(printed)
      const entries = Object.keys(printed)
      return fc.record({
        parse: fc.constant(parse as (json: string) => unknown),
        json: fc.oneof(
          odd.map(value => JSON.stringify(value)),
          fc.tuple(fc.constantFrom(...entries), odd).map(([key, value]) => {
            const copy = structuredClone(printed)
            Reflect.set(copy, key, value)
            return JSON.stringify(copy)
          }),
          fc.nat(text.length).map(length => text.slice(0, length)),
          fc.string(),
        ),
      })
    })
    let refused = 0
    fc.assert(
      fc.property(mangled, ({ parse, json }) => {
        try {
          expect(parse(json)).toBeDefined()
        } catch (error) {
          refused++
          expect(error).toMatchObject({ name: 'VarveError', code: 'RBD_FAILED' })
        }
      }),
      fuzz(300),
    )
    expect(refused).toBeGreaterThan(0)
  },
  FUZZ_TIMEOUT_MS,
)
