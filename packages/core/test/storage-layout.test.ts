import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { assertKey } from '../src/storage.ts'
import {
  backupFolder,
  backupOfKey,
  instanceFolder,
  instanceOfFolder,
  parseManifestKey,
} from '../src/storage-layout.ts'

const FULL = '20261123-231543-123-9f3a1c'
const NEXT = '20261124-231543-123-77aa01'

const invalidArgument = expect.objectContaining({ code: 'INVALID_ARGUMENT' })

/** Names as someone may give an instance, among them nasty ones. */
const name = fc.oneof(
  fc.string({ unit: 'binary', minLength: 1, maxLength: 20 }),
  fc.string({
    unit: fc.constantFrom('.', '..', '/', '\\', '%', '2E', ' ', 'a', 'é', '𝕏', '~'),
    minLength: 1,
    maxLength: 12,
  }),
)
const validName = name.filter(
  text =>
    Buffer.byteLength(text) <= 80 && ![...text].some(char => char < ' ' || (char >= '\x7f' && char < '\xa0')),
)

describe("an instance's folder", () => {
  it.each([
    ['web-1', 'web-1'],
    ['web.example_A', 'web.example_A'],
    ['..', '%2E%2E'],
    ['.', '%2E'],
    ['...', '%2E.%2E'],
    ['.hidden', '%2Ehidden'],
    ['dotted.', 'dotted%2E'],
    ['a/b', 'a%2Fb'],
    ['50%', '50%25'],
    ['café', 'caf%C3%A9'],
  ])('of %j is %j', (instance, folder) => {
    expect(instanceFolder(instance)).toBe(folder)
  })

  it('is one safe name that leads back to the instance', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(validName, instance => {
        const folder = instanceFolder(instance)
        expect(folder).toMatch(/^[A-Za-z0-9_%-]([A-Za-z0-9_.%-]*[A-Za-z0-9_%-])?$/)
        expect(Buffer.byteLength(folder)).toBeLessThanOrEqual(240)
        expect(instanceOfFolder(folder)).toBe(instance)
        assertKey(folder)
      }),
      { numRuns: 200 },
    )
  })

  it('is known by no other spelling', () => {
    for (const folder of ['%61', 'caf%c3%a9', 'a b', '..', '', '%', '%FF', '%00', '%0A', 'dotted.', 'é']) {
      expect(instanceOfFolder(folder)).toBeUndefined()
    }
  })

  it.each(['', 'x'.repeat(81), 'é'.repeat(41), 'a\nb', 'a\0b', '\x1b[2J', 'a\u0085b', '\ud800'])(
    'is refused for %j',
    instance => {
      expect(() => instanceFolder(instance)).toThrow(invalidArgument)
    },
  )
})

describe("a backup's folder", () => {
  it('is below its chain and its instance', () => {
    expect(backupFolder('web-1', FULL, NEXT)).toBe(`web-1/${FULL}/${NEXT}`)
  })

  it.each([
    ['..', NEXT],
    [FULL, '../x'],
    [FULL, ''],
  ])('is refused for the ids %j, %j', (chain, backup) => {
    expect(() => backupFolder('web-1', chain, backup)).toThrow(invalidArgument)
  })
})

describe("a manifest's key", () => {
  it('tells instance, chain and backup', () => {
    expect(parseManifestKey(`caf%C3%A9/${FULL}/${NEXT}/manifest.json`)).toEqual({
      instance: 'café',
      chain: FULL,
      backup: NEXT,
      folder: `caf%C3%A9/${FULL}/${NEXT}`,
    })
  })

  it.each([
    `web-1/${FULL}/${NEXT}/vda.qcow2`,
    `web-1/${FULL}/${NEXT}/manifest.json/x`,
    `x/web-1/${FULL}/${NEXT}/manifest.json`,
    `web-1/${FULL}/manifest.json`,
    `web-1/${FULL}/../manifest.json`,
    `../${FULL}/${NEXT}/manifest.json`,
    `%61/${FULL}/${NEXT}/manifest.json`,
    'manifest.json',
    '',
  ])('is not %j', key => {
    expect(parseManifestKey(key)).toBeUndefined()
  })
})

describe('a key', () => {
  it.each(['vda.qcow2', 'manifest.json', 'deep/down/file'])('tells the backup that %j is in', file => {
    expect(backupOfKey(`web-1/${FULL}/${NEXT}/${file}`)).toEqual({
      instance: 'web-1',
      chain: FULL,
      backup: NEXT,
      folder: `web-1/${FULL}/${NEXT}`,
    })
  })

  it.each([
    `web-1/${FULL}/${NEXT}`,
    `web-1/${FULL}/notes.txt`,
    `web-1/${FULL}/other/vda.qcow2`,
    `web-1/other/${NEXT}/vda.qcow2`,
    `../${FULL}/${NEXT}/vda.qcow2`,
    '',
  ])('is in no backup: %j', key => {
    expect(backupOfKey(key)).toBeUndefined()
  })
})
