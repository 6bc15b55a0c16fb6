import { isVarveError, type VarveEvent } from '@varve/core'

/** What a panel shows of one backup in its queue. */
export interface JobView {
  readonly instance: string
  /** `attention`: there is a good backup, and its host needs somebody to look at it, as the last note says. */
  readonly state: 'waiting' | 'running' | 'done' | 'attention' | 'failed' | 'cancelled'
  /** The id of the backup, once there is one. */
  readonly backup?: string
  /** What is being done now. */
  readonly stage: string
  /** Of all disks together, 0 to 100. */
  readonly percent: number
  readonly bytesPerSecond: number
  /** Of the disk that takes longest. */
  readonly secondsLeft: number | undefined
  /** Fallbacks, warnings, and why it failed. */
  readonly notes: readonly string[]
  /** The disks so far, for the percentage of all. */
  readonly disks: Readonly<Record<string, { done: number; total: number; rate: number; left?: number }>>
}

/** A job that waits for its turn. */
export function newJobView(instance: string): JobView {
  return {
    instance,
    state: 'waiting',
    stage: '',
    percent: 0,
    bytesPerSecond: 0,
    secondsLeft: undefined,
    notes: [],
    disks: {},
  }
}

/** The view after an event. A pure function, so the same events can also be replayed from a log. */
export function reduceEvent(view: JobView, event: VarveEvent): JobView {
  switch (event.type) {
    case 'stage':
      return { ...view, stage: event.message }
    case 'fallback':
    case 'warning':
      return { ...view, notes: [...view.notes, event.message] }
    case 'command':
      return view // for the task log: each external command with its output and exit code
    case 'progress': {
      const { disk, bytesDone: done, bytesTotal: total, bytesPerSecond: rate, secondsLeft: left } = event
      const disks = { ...view.disks, [disk]: { done, total, rate, ...(left !== undefined && { left }) } }
      const all = Object.values(disks)
      const running = all.filter(one => one.done < one.total)
      const totalBytes = all.reduce((bytes, one) => bytes + one.total, 0)
      const doneBytes = all.reduce((bytes, one) => bytes + one.done, 0)
      const times = running.flatMap(one => (one.left === undefined ? [] : [one.left]))
      return {
        ...view,
        disks,
        percent: totalBytes === 0 ? 100 : (doneBytes / totalBytes) * 100,
        bytesPerSecond: running.reduce((sum, one) => sum + one.rate, 0),
        secondsLeft: times.length > 0 ? Math.max(...times) : undefined,
      }
    }
  }
}

/** The view of a job that has ended with an error. */
export function reduceError(view: JobView, error: unknown): JobView {
  const note = isVarveError(error) ? `${error.code}: ${error.message}` : String(error)
  const ended = { ...view, notes: [...view.notes, note] }
  const published = isVarveError(error) ? error.context.published : undefined
  if (typeof published === 'string') return { ...ended, state: 'attention', backup: published }
  // By the code: what failed while it was cancelled has failed, such as an overlay that was not merged.
  return { ...ended, state: isVarveError(error, 'ABORTED') ? 'cancelled' : 'failed' }
}
