import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { backupTime, isBackupId, newBackupId } from '../src/backup-id.ts'

const time = fc.date({ min: new Date('2000-01-01'), max: new Date('2199-12-31'), noInvalidDate: true })

describe('a backup id', () => {
  it('reads as its UTC time', () => {
    const id = newBackupId(undefined, new Date('2026-11-23T23:15:43.123Z'))
    expect(id).toMatch(/^20261123-231543-123-[0-9a-f]{6}$/)
  })

  it('carries its time to the millisecond', () => {
    fc.assert(
      fc.property(time, now => {
        expect(backupTime(newBackupId(undefined, now))).toEqual(now)
      }),
    )
  })

  it('is recognised', () => {
    fc.assert(
      fc.property(time, now => {
        expect(isBackupId(newBackupId(undefined, now))).toBe(true)
      }),
    )
  })

  it('sorts by time', () => {
    fc.assert(
      fc.property(time, time, (a, b) => {
        fc.pre(a.getTime() !== b.getTime())
        expect(newBackupId(undefined, a) < newBackupId(undefined, b)).toBe(a < b)
      }),
    )
  })

  it('sorts after the one it was given, whatever the clock says', () => {
    fc.assert(
      fc.property(time, time, (former, now) => {
        const after = newBackupId(undefined, former)
        const id = newBackupId(after, now)
        expect(id > after).toBe(true)
        expect(id.slice(0, 19)).not.toBe(after.slice(0, 19))
        expect(isBackupId(id)).toBe(true)
      }),
    )
  })

  it('sorts after one of the same millisecond that it was given', () => {
    const now = new Date('2026-11-23T23:15:43.123Z')
    expect(newBackupId(newBackupId(undefined, now), now)).toMatch(/^20261123-231543-124-/)
  })

  it('differs from others of the same millisecond', () => {
    const now = new Date('2026-11-23T23:15:43.123Z')
    expect(new Set(Array.from({ length: 50 }, () => newBackupId(undefined, now))).size).toBeGreaterThan(45)
  })

  it.each([
    '',
    '20261123-231543-123-9f3a1',
    '20261123-231543-123-9F3A1C',
    '20261123-231543-123-9f3a1c ',
    '20261123-231543-123-9f3a1c\n',
    '../20261123-231543-123-9f3a1c',
    '20261323-231543-123-9f3a1c',
    '20260230-231543-123-9f3a1c',
    '20261123-241543-123-9f3a1c',
    '20261123-240000-000-9f3a1c',
    '20261123-236043-123-9f3a1c',
  ])('is not %j', text => {
    expect(isBackupId(text)).toBe(false)
  })
})
