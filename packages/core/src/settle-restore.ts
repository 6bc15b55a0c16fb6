import { open, rename, rm } from 'node:fs/promises'
import { dirname } from 'node:path'
import type { Host } from './host.ts'
import type { RunJournal } from './journal.ts'
import { stopExports } from './qemu-nbd.ts'
import { emit, type RunOptions } from './run-options.ts'

/** What a restore came to. */
export interface SettledRestore {
  /** Whether the new disks took the place of the old ones. */
  readonly finished: boolean
  readonly started: boolean
  /** The disks that were being written over and are incomplete. */
  readonly incomplete: readonly string[]
}

/**
 * Ends a restore: after success, failure or, by `recover`, the death of its process. Once every new file is
 * complete, which the step `finish` tells, it is carried through; before, the new files are removed. Then the
 * instance is started if it is to run, unless a disk of it is incomplete. May be cut short and called again.
 */
export async function settleRestore(
  journal: RunJournal,
  host: Host,
  run: Omit<RunOptions, 'signal'>,
): Promise<SettledRestore> {
  const names = journal.header.disks.map(({ name }) => name)
  for (const { folder } of journal.of('export')) await stopExports(folder, names)

  const finish = journal.of('finish').at(-1)
  if (finish) {
    emit(run, { type: 'stage', stage: 'swap', message: 'Putting the new disks in place' })
    for (const step of finish.renames) await replace(step)
    for (const { xml, nvram } of journal.of('define')) {
      if (nvram) await replace(nvram)
      await host.define(xml, run)
    }
  }
  for (const { temporary } of journal.of('target-create')) await rm(temporary, { force: true })

  const writing = journal.of('written-in-place').length > 0 ? [] : journal.of('write-in-place')
  const power = journal.of('power-off').at(-1)
  const wanted = finish ? power?.start : power?.wasRunning
  const start = wanted === true && writing.length === 0
  // Settled before the start: an instance that does not start is no reason to hold its disks.
  await journal.settled()
  if (power && start) {
    emit(run, { type: 'stage', stage: 'start', message: `Starting ${power.instance}` })
    await host.start(power.instance, run)
  }
  return { finished: finish !== undefined, started: start, incomplete: writing.map(({ disk }) => disk) }
}

/** Renames a complete file over its target, durably. Done before, it is left as it is. */
async function replace({ temporary, target }: { temporary: string; target: string }): Promise<void> {
  try {
    await rename(temporary, target)
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return
    throw error
  }
  const folder = await open(dirname(target))
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}
