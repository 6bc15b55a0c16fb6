import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { blake3Hex } from '../../src/digest.ts'
import type { JournalStepName } from '../../src/journal.ts'
import type { BackupManifest } from '../../src/manifest.ts'
import { INSTANCE } from './guest.ts'
import type { Task } from './job.ts'
import type { ProvingGround } from './proving-ground.ts'
import { Random } from './random.ts'

/** The backups that a template has on its first storage: a full one and two increments. */
export interface Prepared {
  readonly full: BackupManifest
  readonly middle: BackupManifest
  readonly newest: BackupManifest
}

/** A run that is to be killed at each of its points. */
export interface Scenario {
  readonly name: string
  /** Plain images, or a domain that is off or running when the run begins. */
  readonly instance: 'images' | 'off' | 'running'
  /**
   * Makes the state that the run begins with; `chain` has three backups and changes since, `chains` a second full one,
   * `refused` a backup whose definition no host takes, `backed` a definition that names a backing file, `damaged` a backup of
   * which one disk can be restored, see {@link damage}.
   */
  readonly from: 'empty' | 'chain' | 'chains' | 'refused' | 'backed' | 'damaged'
  /** What the journal of the run holds. */
  readonly steps: readonly JournalStepName[]
  task(prepared: Prepared, ground: ProvingGround): Task
}

const backup = (request: object = {}): Task => ({
  kind: 'backup',
  request: { instance: INSTANCE, ...request },
})

const over = (backupId: string, more: object = {}): Task => ({
  kind: 'restore',
  request: { backup: backupId, to: { instance: INSTANCE }, powerOffTimeoutMs: 0, ...more },
})

const BACKUP = ['bitmap-add', 'export', 'upload', 'publish', 'published'] as const
const RUNNING_BACKUP = [...BACKUP, 'snapshot', 'frozen', 'merging', 'pivot', 'merged'] as const
const RESTORE = ['power-off', 'powered-off', 'target-create', 'finish'] as const
const IN_PLACE = [
  'power-off',
  'powered-off',
  'export',
  'mark-incomplete',
  'write-in-place',
  'written-in-place',
] as const

export const SCENARIOS: readonly Scenario[] = [
  {
    name: 'first backup of images',
    instance: 'images',
    from: 'empty',
    steps: BACKUP,
    task: () => backup(),
  },
  { name: 'increment of images', instance: 'images', from: 'chain', steps: BACKUP, task: () => backup() },
  {
    name: 'increment of an instance that is off',
    instance: 'off',
    from: 'chain',
    steps: BACKUP,
    task: () => backup(),
  },
  {
    name: 'first backup of a running instance, frozen by its agent',
    instance: 'running',
    from: 'empty',
    steps: [...RUNNING_BACKUP, 'filesystem-freeze', 'filesystem-thawed'],
    task: () => backup({ freeze: 'require' }),
  },
  {
    name: 'increment of a running instance',
    instance: 'running',
    from: 'chain',
    steps: RUNNING_BACKUP,
    task: () => backup(),
  },
  {
    name: 'increment of one disk of a running instance',
    instance: 'running',
    from: 'chain',
    steps: RUNNING_BACKUP,
    task: () => backup({ disks: ['vdb'] }),
  },
  {
    name: 'new full backup of a running instance',
    instance: 'running',
    from: 'chain',
    steps: RUNNING_BACKUP,
    task: () => backup({ type: 'full' }),
  },
  {
    name: 'increment of a running instance on a template',
    instance: 'running',
    from: 'backed',
    steps: RUNNING_BACKUP,
    task: () => backup(),
  },
  {
    name: 'restore over images',
    instance: 'images',
    from: 'chain',
    steps: RESTORE,
    task: ({ middle }) => over(middle.id),
  },
  {
    name: 'restore over a running instance',
    instance: 'running',
    from: 'chain',
    steps: RESTORE,
    task: ({ middle }) => over(middle.id),
  },
  {
    name: 'restore of disks and definition of an instance that is off',
    instance: 'off',
    from: 'chain',
    steps: [...RESTORE, 'define', 'defined'],
    task: ({ newest }) => over(newest.id, { definition: 'restore', start: true }),
  },
  {
    name: 'restore whose definition is refused',
    instance: 'running',
    from: 'refused',
    steps: [...RESTORE, 'define', 'undo'],
    task: ({ newest }) => over(newest.id, { definition: 'restore' }),
  },
  {
    name: 'restore over an instance that is off, whose definition names a backing file',
    instance: 'off',
    from: 'backed',
    steps: [...RESTORE, 'drop-backing', 'defined'],
    task: ({ middle }) => over(middle.id, { start: true }),
  },
  {
    name: 'restore in place of images',
    instance: 'images',
    from: 'chain',
    steps: IN_PLACE,
    task: ({ middle }) => over(middle.id, { inPlace: true }),
  },
  {
    name: 'restore in place of a running instance',
    instance: 'running',
    from: 'chain',
    steps: IN_PLACE,
    task: ({ middle }) => over(middle.id, { inPlace: true }),
  },
  {
    name: 'restore in place that fails at its second disk',
    instance: 'images',
    from: 'damaged',
    steps: ['power-off', 'powered-off', 'export', 'write-in-place', 'incomplete'],
    task: ({ middle }) => over(middle.id, { inPlace: true }),
  },
  {
    name: 'deletion of the newest backup',
    instance: 'images',
    from: 'chain',
    steps: [],
    task: ({ newest }) => ({ kind: 'delete', backup: newest.id }),
  },
  {
    name: 'pruning of a chain',
    instance: 'images',
    from: 'chains',
    steps: [],
    task: () => ({ kind: 'prune', policy: { instance: INSTANCE, keepLast: 1 } }),
  },
]

/** Whether the run of a scenario is to fail, where nobody kills it. */
export function isToFail({ from }: Scenario): boolean {
  return from === 'refused' || from === 'damaged'
}

/** The points before and after the steps of a scenario. */
export function aroundSteps({ steps }: Scenario): string[] {
  return steps.flatMap(step => [`before ${step}`, `after ${step}`])
}

/** Makes the templates that these scenarios begin with, once for each ground. */
export async function prepareTemplates(
  ground: ProvingGround,
  scenarios: readonly Scenario[],
): Promise<Prepared> {
  const isWanted = (template: Scenario['from']) => scenarios.some(({ from }) => from === template)
  const random = new Random(1)
  await ground.clear()
  await ground.write(random)
  await ground.save('empty')

  const full = await ground.backup('first')
  await ground.write(random)
  await ground.backup('second')
  await ground.write(random)
  const middle = await ground.backup('first')
  await ground.write(random)
  const newest = await ground.backup('first')
  await ground.write(random)
  await ground.save('chain')

  if (isWanted('chains')) {
    await ground.backup('first', { type: 'full' })
    await ground.write(random)
    await ground.save('chains')
  }
  if (isWanted('damaged')) {
    await ground.load('chain')
    await damage(ground, middle)
    await ground.save('damaged')
  }
  if (isWanted('refused')) {
    await ground.load('chain')
    await refuseDefinition(ground, newest)
    await ground.save('refused')
  }
  if (isWanted('backed')) {
    await ground.load('chain')
    await ground.putOnBacking()
    await ground.save('backed')
  }
  return { full, middle, newest }
}

/** Damages the second disk of a backup; called again, it puts it right. */
export async function damage(ground: ProvingGround, { chain, id }: BackupManifest): Promise<void> {
  const path = join(ground.storagePath('first'), INSTANCE, chain, id, 'vdb.blake3')
  const digests = await readFile(path)
  await writeFile(
    path,
    digests.map(byte => byte ^ 1),
  )
}

/** Puts a definition that no host takes into a backup. */
async function refuseDefinition(ground: ProvingGround, { chain, id }: BackupManifest): Promise<void> {
  const folder = join(ground.storagePath('first'), INSTANCE, chain, id)
  const xml = (await readFile(join(folder, 'domain.xml'), 'utf8')).replace(
    /machine='[^']*'/,
    "machine='pc-q35-99.9'",
  )
  await writeFile(join(folder, 'domain.xml'), xml)
  const path = join(folder, 'manifest.json')
  const json = JSON.parse(await readFile(path, 'utf8'))
  Object.assign(json.definition, { size: Buffer.byteLength(xml), blake3: blake3Hex(Buffer.from(xml)) })
  await writeFile(path, JSON.stringify(json))
}
