import fc from 'fast-check'
import { describe, expect, it } from 'vitest'
import { backupTime } from '../src/backup-id.ts'
import {
  planRetention,
  type RetentionItem,
  type RetentionPlan,
  type RetentionPolicy,
} from '../src/retention.ts'

/** An id of a time such as `2026-11-23 23:15`. */
function id(time: string, tail = 'abc123'): string {
  const [day = '', clock = '12:00'] = time.split(' ')
  return `${day.replaceAll('-', '')}-${clock.replace(':', '')}00-000-${tail}`
}

type Item = Omit<RetentionItem, 'startedAt'>

/** The plan for backups that began when their ids say. */
function planOf(items: readonly Item[], policy: RetentionPolicy): RetentionPlan {
  return planRetention(
    items.map(item => ({ ...item, startedAt: backupTime(item.id) })),
    policy,
  )
}

function fulls(...times: string[]): Item[] {
  return times.map(time => ({ id: id(time) }))
}

function kept(items: readonly Item[], policy: RetentionPolicy): Record<string, string[]> {
  return Object.fromEntries(planOf(items, policy).keep.map(({ id, reasons }) => [id, [...reasons]]))
}

describe('retention', () => {
  it('keeps the newest backups', () => {
    const items = fulls('2026-11-03', '2026-11-01', '2026-11-02')
    expect(kept(items, { keepLast: 2 })).toEqual({
      [id('2026-11-02')]: ['last'],
      [id('2026-11-03')]: ['last'],
    })
    expect(planOf(items, { keepLast: 2 }).remove).toEqual([id('2026-11-01')])
  })

  it('keeps the newest backup of each day, and counts only days that have one', () => {
    const items = fulls('2026-11-01 01:00', '2026-11-01 23:00', '2026-11-05 08:00', '2026-11-20 07:00')
    expect(Object.keys(kept(items, { keepDaily: 3 }))).toEqual([
      id('2026-11-01 23:00'),
      id('2026-11-05 08:00'),
      id('2026-11-20 07:00'),
    ])
    expect(Object.keys(kept(items, { keepDaily: 2 }))).toEqual([
      id('2026-11-05 08:00'),
      id('2026-11-20 07:00'),
    ])
  })

  // 28 December 2026 is a Monday: its ISO week goes on to 3 January 2027.
  it('counts ISO weeks, from Monday on, also over New Year', () => {
    const items = fulls('2026-12-27', '2026-12-28', '2026-12-31', '2027-01-03', '2027-01-04')
    expect(Object.keys(kept(items, { keepWeekly: 9 }))).toEqual([
      id('2026-12-27'),
      id('2027-01-03'),
      id('2027-01-04'),
    ])
  })

  it('keeps the newest backup of each month and of each year', () => {
    const items = fulls('2025-12-30', '2025-12-31', '2026-01-01', '2026-01-31', '2026-02-01')
    expect(kept(items, { keepMonthly: 2, keepYearly: 5 })).toEqual({
      [id('2025-12-31')]: ['yearly'],
      [id('2026-01-31')]: ['monthly'],
      [id('2026-02-01')]: ['monthly', 'yearly'],
    })
  })

  it('names every rule that keeps a backup', () => {
    const rules = { keepLast: 1, keepDaily: 1, keepWeekly: 1, keepMonthly: 1, keepYearly: 1 }
    expect(kept(fulls('2026-11-01'), rules)).toEqual({
      [id('2026-11-01')]: ['last', 'daily', 'weekly', 'monthly', 'yearly'],
    })
  })

  it('knows the weeks and years of ids with any four digits', () => {
    const items = fulls('0999-12-30', '0999-12-31', '1000-01-01')
    expect(kept(items, { keepWeekly: 9, keepYearly: 9 })).toEqual({
      [id('0999-12-31')]: ['yearly'],
      [id('1000-01-01')]: ['weekly', 'yearly'],
    })
  })

  it('begins days in the time zone of the policy, by default UTC', () => {
    // Midnight in Vienna is 23:00 UTC in winter, 22:00 UTC in summer.
    const winter = fulls('2026-11-23 22:30', '2026-11-23 23:30')
    const summer = fulls('2026-07-23 21:30', '2026-07-23 22:30')
    const timeZone = 'Europe/Vienna'
    expect(Object.keys(kept(winter, { keepDaily: 9 }))).toHaveLength(1)
    expect(Object.keys(kept(winter, { keepDaily: 9, timeZone }))).toHaveLength(2)
    expect(Object.keys(kept(summer, { keepDaily: 9, timeZone }))).toHaveLength(2)
    expect(
      Object.keys(kept(fulls('2025-12-31 23:30', '2026-01-01 00:30'), { keepYearly: 9, timeZone })),
    ).toHaveLength(1)
  })

  it('keeps what a kept backup rests on', () => {
    const items = [
      { id: id('2026-11-01') },
      { id: id('2026-11-02'), parent: id('2026-11-01') },
      { id: id('2026-11-03'), parent: id('2026-11-02') },
      { id: id('2026-11-04'), parent: id('2026-11-02') },
    ]
    expect(kept(items, { keepLast: 1 })).toEqual({
      [id('2026-11-01')]: ['ancestor'],
      [id('2026-11-02')]: ['ancestor'],
      [id('2026-11-04')]: ['last'],
    })
  })

  it('keeps damaged backups without counting them', () => {
    const items = [
      { id: id('2026-11-01') },
      { id: id('2026-11-02') },
      { id: id('2026-11-03'), damaged: true },
      { id: id('2026-11-04'), parent: id('2026-11-03'), damaged: true },
    ]
    expect(kept(items, { keepLast: 1 })).toEqual({
      [id('2026-11-02')]: ['last'],
      [id('2026-11-03')]: ['damaged', 'ancestor'],
      [id('2026-11-04')]: ['damaged'],
    })
  })

  it('names children before their parents for removal', () => {
    const items = [
      { id: id('2026-11-01') },
      { id: id('2026-11-02'), parent: id('2026-11-01') },
      { id: id('2026-11-03') },
    ]
    expect(planOf(items, { keepLast: 1 }).remove).toEqual([id('2026-11-02'), id('2026-11-01')])
  })

  it.each<[RetentionPolicy, string, object]>([
    [{}, 'keeps nothing', {}],
    [{ keepLast: 0 }, 'keeps nothing', {}],
    [{ keepLast: 0, keepDaily: 0, keepWeekly: 0, keepMonthly: 0, keepYearly: 0 }, 'keeps nothing', {}],
    [{ timeZone: 'UTC' }, 'keeps nothing', {}],
    [{ keepLast: -1 }, 'last backups to keep is -1', { rule: 'last' }],
    [{ keepLast: 1.5 }, 'last backups to keep is 1.5', { rule: 'last' }],
    [{ keepLast: Number.NaN }, 'last backups to keep is NaN', { rule: 'last' }],
    [{ keepLast: Infinity }, 'last backups to keep is Infinity', { rule: 'last' }],
    [{ keepLast: 1, keepDaily: -1 }, 'daily backups to keep is -1', { rule: 'daily' }],
    [
      { keepLast: 1, timeZone: 'Mars/Olympus' },
      'Not a time zone: "Mars/Olympus"',
      { timeZone: 'Mars/Olympus' },
    ],
    [{ keepLast: 1, timeZone: '' }, 'Not a time zone: ""', { timeZone: '' }],
  ])('refuses the policy %j and says why', (policy, why, context) => {
    const message = expect.stringContaining(why)
    expect(() => planOf([], policy)).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT', message, context }),
    )
  })

  it('passes on what is wrong with a time zone', () => {
    const cause = expect.any(RangeError)
    expect(() => planOf([], { keepLast: 1, timeZone: 'Mars/Olympus' })).toThrow(
      expect.objectContaining({ cause }),
    )
  })
})

/** Backups of random times within three years; each either begins a chain or rests on an older one. */
const anyItems: fc.Arbitrary<Item[]> = fc
  .uniqueArray(
    fc.record({
      minute: fc.integer({ min: 0, max: 3 * 365 * 24 * 60 }),
      parent: fc.option(fc.nat(), { nil: undefined }),
      damaged: fc.integer({ min: 0, max: 9 }).map(die => die === 0),
    }),
    { selector: ({ minute }) => minute, maxLength: 40 },
  )
  .map(drawn => {
    const start = Date.UTC(2025, 0, 1)
    const items: Item[] = []
    for (const { minute, parent, damaged } of drawn.sort((a, b) => a.minute - b.minute)) {
      const iso = new Date(start + minute * 60_000).toISOString()
      const base = parent === undefined ? undefined : items[parent % Math.max(1, items.length)]
      items.push({
        id: id(`${iso.slice(0, 10)} ${iso.slice(11, 16)}`),
        ...(base && { parent: base.id }),
        damaged,
      })
    }
    return items
  })
  .chain(items => fc.shuffledSubarray(items, { minLength: items.length }))

const timeZones = ['UTC', 'Europe/Vienna', 'Pacific/Kiritimati', 'America/St_Johns']
const count = fc.integer({ min: 0, max: 6 })
const anyPolicy: fc.Arbitrary<Required<RetentionPolicy>> = fc
  .record({
    keepLast: count,
    keepDaily: count,
    keepWeekly: count,
    keepMonthly: count,
    keepYearly: count,
    timeZone: fc.constantFrom(...timeZones),
  })
  .filter(({ timeZone: _, ...counts }) => Object.values(counts).some(count => count > 0))

/** The rule in its plainest form: split into periods, take the newest of each, then the newest so many. */
function newestOfPeriods(items: readonly Item[], count: number, periodOf: (id: string) => string): string[] {
  const sound = items.filter(({ damaged }) => !damaged).map(({ id }) => id)
  const periods = [...new Set(sound.map(periodOf))]
  const newest = periods.map(
    period =>
      sound
        .filter(id => periodOf(id) === period)
        .sort()
        .at(-1) ?? '',
  )
  return newest.sort().reverse().slice(0, count)
}

const swedish = new Map(timeZones.map(timeZone => [timeZone, new Intl.DateTimeFormat('sv-SE', { timeZone })]))

/** The local date of a backup as the Swedish write it, which is year-month-day. */
function localDay(id: string, timeZone: string): string {
  const [, y, m, d, h, min] = /^(....)(..)(..)-(..)(..)/.exec(id) ?? []
  return swedish.get(timeZone)?.format(new Date(`${y}-${m}-${d}T${h}:${min}:00Z`)) ?? expect.fail()
}

/** Year and number of a day's ISO week: those of its Thursday. */
function isoWeek(day: string): string {
  const thursday = new Date(`${day}T00:00:00Z`)
  while (thursday.getUTCDay() !== 4) {
    const forward = thursday.getUTCDay() >= 1 && thursday.getUTCDay() < 4
    thursday.setUTCDate(thursday.getUTCDate() + (forward ? 1 : -1))
  }
  const year = thursday.getUTCFullYear()
  return `${year}-W${Math.floor((thursday.getTime() - Date.UTC(year, 0, 1)) / 604_800_000) + 1}`
}

function modelKeeps(items: readonly Item[], policy: Required<RetentionPolicy>): Set<string> {
  const day = (id: string) => localDay(id, policy.timeZone)
  const keep = new Set([
    ...newestOfPeriods(items, policy.keepLast, id => id),
    ...newestOfPeriods(items, policy.keepDaily, day),
    ...newestOfPeriods(items, policy.keepWeekly, id => isoWeek(day(id))),
    ...newestOfPeriods(items, policy.keepMonthly, id => day(id).slice(0, 7)),
    ...newestOfPeriods(items, policy.keepYearly, id => day(id).slice(0, 4)),
    ...items.filter(({ damaged }) => damaged).map(({ id }) => id),
  ])
  for (const _ of items) {
    for (const { id, parent } of items) if (parent !== undefined && keep.has(id)) keep.add(parent)
  }
  return keep
}

describe('retention of any backups under any policy', () => {
  it('keeps exactly what a plain model keeps, and removes the rest', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(anyItems, anyPolicy, (items, policy) => {
        const plan = planOf(items, policy)
        const expected = modelKeeps(items, policy)
        expect(plan.keep.map(({ id }) => id)).toEqual([...expected].sort())
        expect([...plan.remove].sort()).toEqual(
          items
            .map(({ id }) => id)
            .filter(id => !expected.has(id))
            .sort(),
        )
        for (const { reasons } of plan.keep) expect(reasons.length).toBeGreaterThan(0)
      }),
      { numRuns: 150 },
    )
  })

  it('never removes what a kept backup rests on, and removes children first', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(anyItems, anyPolicy, (items, policy) => {
        const { remove } = planOf(items, policy)
        const removed = new Set<string>()
        for (const gone of remove) {
          removed.add(gone)
          const resting = items.filter(({ id, parent }) => parent === gone && !removed.has(id))
          expect(resting).toEqual([])
        }
      }),
    )
  })

  it('keeps the newest undamaged backup', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(anyItems, anyPolicy, (items, policy) => {
        const newest = items
          .filter(({ damaged }) => !damaged)
          .map(({ id }) => id)
          .sort()
          .at(-1)
        if (newest !== undefined) expect(Object.keys(kept(items, policy))).toContain(newest)
      }),
    )
  })

  it('removes nothing when it is applied again', { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(anyItems, anyPolicy, (items, policy) => {
        const removed = new Set(planOf(items, policy).remove)
        const left = items.filter(({ id }) => !removed.has(id))
        expect(planOf(left, policy).remove).toEqual([])
      }),
    )
  })

  it('keeps no less when a policy asks for more', { timeout: 60_000 }, () => {
    const rule = fc.constantFrom('keepLast', 'keepDaily', 'keepWeekly', 'keepMonthly', 'keepYearly')
    fc.assert(
      fc.property(anyItems, anyPolicy, rule, (items, policy, rule) => {
        const more = { ...policy, [rule]: policy[rule] + 1 }
        const now = Object.keys(kept(items, more))
        expect(now).toEqual(expect.arrayContaining(Object.keys(kept(items, policy))))
      }),
    )
  })
})
