import { randomBytes } from 'node:crypto'

/** The form of a backup id. {@link isBackupId} looks at the date and time in it as well. */
export const BACKUP_ID_FORM: RegExp = /^\d{8}-\d{6}-\d{3}-[0-9a-f]{6}$/

/**
 * A new id, such as `20261123-231543-123-9f3a1c`: UTC date, time and milliseconds, then six random hex
 * digits. Ids sort by time; one given `after` another sorts after it, also when the clock went back.
 */
export function newBackupId(after?: string, now: Date = new Date()): string {
  let time = now
  if (after !== undefined && timestamp(now) <= after.slice(0, 19))
    time = new Date(backupTime(after).getTime() + 1)
  return `${timestamp(time)}-${randomBytes(3).toString('hex')}`
}

/** Whether `text` is a backup id, with a real date and time in it, and so is safe in a key or a file name. */
export function isBackupId(text: string): boolean {
  if (!BACKUP_ID_FORM.test(text)) return false
  const time = backupTime(text)
  return !Number.isNaN(time.getTime()) && text.startsWith(timestamp(time)) // neither month 13 nor 30 February
}

/** The time in an id, for one that {@link isBackupId} accepts. */
export function backupTime(id: string): Date {
  const [d = '', t = '', ms = ''] = id.split('-')
  return new Date(
    `${d.slice(0, 4)}-${d.slice(4, 6)}-${d.slice(6)}T${t.slice(0, 2)}:${t.slice(2, 4)}:${t.slice(4)}.${ms}Z`,
  )
}

function timestamp(time: Date): string {
  const iso = time.toISOString()
  const digits = iso.replace(/[-:TZ.]/g, '')
  return `${digits.slice(0, 8)}-${digits.slice(8, 14)}-${digits.slice(14, 17)}`
}
