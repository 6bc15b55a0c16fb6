import { VarveError } from './errors.ts'

/**
 * Which backups of an instance are kept. Each rule keeps the newest backup of each of the newest so many
 * periods in which there are any; a backup is kept when any rule keeps it. At least one rule is needed.
 */
export interface RetentionPolicy {
  /** Backups, whatever their age. */
  keepLast?: number
  /** Days. */
  keepDaily?: number
  /** Weeks, as ISO 8601 counts them: from Monday on. */
  keepWeekly?: number
  /** Months. */
  keepMonthly?: number
  /** Years. */
  keepYearly?: number
  /** IANA name of the time zone in which days begin, such as `Europe/Vienna`. Default: `UTC`. */
  timeZone?: string
}

/**
 * Why a backup is kept. `last` to `yearly`: the rule of this name. `ancestor`: a kept one rests on it.
 * `damaged`: something in its chain is broken, so that someone has to look at it first.
 */
export type RetentionReason = 'last' | 'daily' | 'weekly' | 'monthly' | 'yearly' | 'ancestor' | 'damaged'

/** A backup as {@link planRetention} sees it. Ids tell which is newer. */
export interface RetentionItem {
  readonly id: string
  /** When it began. Its id may be of another year: after one from a clock that was ahead, ids go on from there. */
  readonly startedAt: Date
  /** Whose it is. The rules count the backups of each by themselves. */
  readonly owner?: string | undefined
  /** The backup that it rests on; older than it, and perhaps of another owner. */
  readonly parent?: string
  /** Kept whatever the rules say, and counted by none: it may not be fit to restore from. */
  readonly damaged?: boolean
}

/** What {@link planRetention} decides. */
export interface RetentionPlan {
  /** Oldest first, each with at least one reason. */
  readonly keep: readonly { readonly id: string; readonly reasons: readonly RetentionReason[] }[]
  /** Newest first, so that each comes before what it rests on. */
  readonly remove: readonly string[]
}

/**
 * Decides which backups of one instance's name are kept. What a kept backup rests on is kept too. The newest
 * undamaged backup of each owner is always kept, since every rule begins with it.
 *
 * @throws INVALID_ARGUMENT for a policy without a rule, a count that is no natural number, or an unknown time zone
 */
export function planRetention(items: readonly RetentionItem[], policy: RetentionPolicy): RetentionPlan {
  const rules = readRules(policy)
  const newestFirst = [...items].sort((a, b) => (a.id < b.id ? 1 : -1))
  const reasons = new Map<string, Set<RetentionReason>>()
  const keep = (id: string, reason: RetentionReason) => {
    reasons.set(id, (reasons.get(id) ?? new Set()).add(reason))
  }

  for (const { reason, count, periodOf } of rules) {
    for (const [, ofOwner] of Map.groupBy(newestFirst, ({ owner }) => owner)) {
      const periods = new Set<string>()
      for (const item of ofOwner) {
        const period = periodOf(item)
        if (item.damaged || periods.has(period)) continue
        if (periods.size === count) break
        periods.add(period)
        keep(item.id, reason)
      }
    }
  }
  for (const { id, damaged } of newestFirst) if (damaged) keep(id, 'damaged')
  // Children come before their parents in this order, so one pass reaches every ancestor.
  for (const { id, parent } of newestFirst)
    if (parent !== undefined && reasons.has(id)) keep(parent, 'ancestor')

  return {
    keep: newestFirst.toReversed().flatMap(({ id }) => {
      const why = reasons.get(id)
      return why ? [{ id, reasons: [...why] }] : []
    }),
    remove: newestFirst.flatMap(({ id }) => (reasons.has(id) ? [] : [id])),
  }
}

interface Rule {
  readonly reason: RetentionReason
  /** Periods of which one backup is kept. */
  readonly count: number
  /** Names the period that a backup is in. */
  readonly periodOf: (item: RetentionItem) => string
}

function readRules(policy: RetentionPolicy): Rule[] {
  const dayOf = calendar(policy.timeZone ?? 'UTC')
  const rules: Rule[] = [
    { reason: 'last', count: policy.keepLast ?? 0, periodOf: ({ id }) => id },
    { reason: 'daily', count: policy.keepDaily ?? 0, periodOf: dayOf },
    { reason: 'weekly', count: policy.keepWeekly ?? 0, periodOf: item => mondayOf(dayOf(item)) },
    { reason: 'monthly', count: policy.keepMonthly ?? 0, periodOf: item => dayOf(item).slice(0, 7) },
    { reason: 'yearly', count: policy.keepYearly ?? 0, periodOf: item => dayOf(item).slice(0, 4) },
  ]
  for (const { reason, count } of rules) {
    if (Number.isSafeInteger(count) && count >= 0) continue
    throw new VarveError(
      'INVALID_ARGUMENT',
      `The number of ${reason} backups to keep is ${count}; it is a whole number, not below 0.`,
      { context: { rule: reason } },
    )
  }
  if (rules.every(({ count }) => count === 0)) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      'The retention keeps nothing. Say how many last, daily, weekly, monthly or yearly backups to keep.',
    )
  }
  return rules
}

/** A function that tells the local day of a backup, as `2026-11-23`. */
function calendar(timeZone: string): (item: RetentionItem) => string {
  try {
    const format = new Intl.DateTimeFormat('en-CA', {
      timeZone,
      calendar: 'iso8601',
      numberingSystem: 'latn',
      year: 'numeric',
      month: '2-digit',
      day: '2-digit',
    })
    return ({ startedAt }) => {
      const parts = new Map(format.formatToParts(startedAt).map(({ type, value }) => [type, value]))
      return `${parts.get('year')?.padStart(4, '0')}-${parts.get('month')}-${parts.get('day')}`
    }
  } catch (cause) {
    throw new VarveError(
      'INVALID_ARGUMENT',
      `Not a time zone: ${JSON.stringify(timeZone)}. Use an IANA name such as Europe/Vienna.`,
      { context: { timeZone }, cause },
    )
  }
}

/** The Monday of a day's ISO week. It names the week as well as year and number do, and has no odd first week. */
function mondayOf(day: string): string {
  const date = new Date(`${day}T00:00:00Z`)
  date.setUTCDate(date.getUTCDate() - ((date.getUTCDay() + 6) % 7))
  return date.toISOString()
}
