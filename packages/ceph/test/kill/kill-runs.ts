import { JOURNAL_STEPS, type JournalStepName } from '../../../core/src/journal.ts'
import type { Task } from '../../../core/test/torture/job.ts'
import { INSTANCES, type InstanceKind, type KillGround } from './kill-ground.ts'

/** A run that is killed at each of its points. */
export interface KillRun {
  readonly kind: InstanceKind
  readonly name: RunName
  /** What its journal holds. */
  readonly steps: readonly JournalStepName[]
}

export type RunName =
  | 'backup'
  | 'full'
  | 'frozen backup'
  | 'restore'
  | 'restore with definition'
  | 'restore in place'
  | 'restore to copies'
  | 'deletion'
  | 'prune'

const BACKUP = ['rbd-snapshot', 'upload', 'publish', 'published'] as const
const OVERLAY = ['bitmap-add', 'snapshot', 'frozen', 'export', 'merging', 'pivot', 'merged'] as const
const SUSPENDED = ['suspend', 'resumed'] as const
const FROZEN = [...SUSPENDED, 'filesystem-freeze', 'filesystem-thawed'] as const
const OFF = ['power-off', 'powered-off'] as const
const SWAP = ['export', 'image-create', 'finish'] as const
const IN_PLACE = [
  ...OFF,
  'export',
  'mark-incomplete',
  'write-in-place',
  'written-in-place',
  'finish',
] as const
const DEFINITION = ['define', 'defined'] as const

const STEPS: Readonly<Record<InstanceKind, Readonly<Partial<Record<RunName, readonly JournalStepName[]>>>>> =
  {
    domain: {
      backup: [...BACKUP, ...SUSPENDED],
      full: [...BACKUP, ...SUSPENDED],
      'frozen backup': [...BACKUP, ...FROZEN],
      restore: [...OFF, ...SWAP],
      'restore with definition': [...OFF, ...SWAP, ...DEFINITION],
      'restore in place': IN_PLACE,
      'restore to copies': SWAP,
      deletion: [],
      prune: [],
    },
    off: {
      backup: BACKUP,
      restore: [...OFF, ...SWAP],
      'restore with definition': [...OFF, ...SWAP, ...DEFINITION],
      'restore in place': IN_PLACE,
    },
    // Not a deletion: the file has the bitmap of the newest backup alone.
    mixed: {
      backup: [...BACKUP, ...OVERLAY, ...SUSPENDED],
      full: [...BACKUP, ...OVERLAY, ...SUSPENDED],
      'frozen backup': [...BACKUP, ...OVERLAY, ...FROZEN],
      restore: [...OFF, ...SWAP, 'target-create'],
      'restore with definition': [...OFF, ...SWAP, 'target-create', ...DEFINITION],
      'restore in place': IN_PLACE,
      'restore to copies': [...SWAP, 'target-create'],
      prune: [],
    },
    images: {
      backup: BACKUP,
      full: BACKUP,
      restore: [...OFF, ...SWAP],
      'restore in place': IN_PLACE,
      'restore to copies': SWAP,
      deletion: [],
      prune: [],
    },
  }

/** Every run of every instance. */
export const RUNS: readonly KillRun[] = INSTANCES.flatMap(kind =>
  (Object.keys(STEPS[kind]) as RunName[]).map(name => ({ kind, name, steps: STEPS[kind][name] ?? [] })),
)

/** Steps that have nothing of RBD; the tests of packages/core have them. A new step belongs in a run here. */
export const ELSEWHERE: readonly JournalStepName[] = ['drop-backing', 'undo', 'unmerged', 'incomplete']

/** The steps that a journal may hold, and no run here records. */
export function stepsWithoutARun(): JournalStepName[] {
  const recorded = new Set(RUNS.flatMap(({ steps }) => steps))
  return JOURNAL_STEPS.filter(step => !recorded.has(step) && !ELSEWHERE.includes(step))
}

export function taskOf(name: RunName, backup: string, ground: KillGround): Task {
  const { instance } = ground
  if (name === 'backup') return { kind: 'backup', request: { instance } }
  if (name === 'full') return { kind: 'backup', request: { instance, type: 'full' } }
  if (name === 'deletion') return { kind: 'delete', backup }
  if (name === 'prune') return { kind: 'prune', policy: { instance, keepLast: 1 } }
  if (name === 'frozen backup') return { kind: 'backup', request: { instance, freeze: 'require' } }
  if (name === 'restore to copies') {
    const disks = { vda: ground.copyPath('vda'), vdb: ground.copyPath('vdb') }
    return { kind: 'restore', request: { backup, to: { disks } } }
  }
  const request = { backup, to: { instance }, powerOffTimeoutMs: 0 }
  if (name === 'restore in place') return { kind: 'restore', request: { ...request, inPlace: true } }
  if (name === 'restore') return { kind: 'restore', request }
  return { kind: 'restore', request: { ...request, definition: 'restore' } }
}
