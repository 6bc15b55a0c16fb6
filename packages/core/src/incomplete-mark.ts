import { errorMessage } from './errors.ts'
import type { Host } from './host.ts'
import { presenceOfOverwritten } from './incomplete.ts'
import type { JournalStepOf, RunJournal } from './journal.ts'
import { addStoppedBitmap, changeImageBitmaps, readImageInfo } from './qemu-img.ts'
import { rbdImageOf } from './rbd.ts'
import { emit, type RunOptions } from './run-options.ts'

/**
 * What a restore in place puts on a disk while that is incomplete, so that it is known on every host: a stopped bitmap of a
 * qcow2 image, or metadata of an RBD image. A raw file or device has no place for it.
 */
const MARK = 'varve-incomplete-'
const METADATA_MARK = 'varve.incomplete.'

export function incompleteMark(runId: string): string {
  return MARK + runId
}

export function incompleteKey(runId: string): string {
  return METADATA_MARK + runId
}

/** What tells the marks of a disk; each is absent where it has no place for them. */
interface MarkedDisk {
  readonly bitmaps?: readonly { readonly name: string }[]
  readonly state?: { readonly metadata?: ReadonlyMap<string, string> }
}

/** The marks that a disk has. */
export function incompleteMarks({ bitmaps = [], state }: MarkedDisk): string[] {
  const names = [...bitmaps.map(({ name }) => name), ...(state?.metadata?.keys() ?? [])]
  return names.filter(name => name.startsWith(MARK) || name.startsWith(METADATA_MARK))
}

/** The marks of an image that nobody has open. */
export async function imageMarks(path: string, run: RunOptions): Promise<string[]> {
  return incompleteMarks(await readImageInfo(path, 'qcow2', run))
}

/** Marks an image that nobody has open. One that has no room for that is restored without. */
export async function markImageIncomplete(path: string, mark: string, run: RunOptions): Promise<void> {
  await addStoppedBitmap(path, mark, run).catch(error => {
    if (run.signal?.aborted) throw error
    const message = `Other hosts are not told that ${path} is incomplete until it is restored: ${errorMessage(error)}`
    emit(run, { type: 'warning', message })
  })
}

/**
 * Takes the mark of a restore off a disk that it has not written to, or all marks off one that is complete.
 *
 * @throws where the disk is not found, and it cannot be told whether it is gone
 */
export async function unmark(
  journal: RunJournal,
  { mark, former, ...disk }: JournalStepOf<'mark-incomplete'>,
  { host, isComplete }: { readonly host: Host; readonly isComplete: boolean },
  run: RunOptions,
): Promise<void> {
  const remove = isComplete ? [mark, ...former] : [mark]
  if ((await presenceOfOverwritten(disk, host, run)) === 'gone') return
  const image = rbdImageOf(disk.path)
  const instance = journal.of('power-off').at(-1)?.instance
  if (image !== undefined) await (await host.rbd(disk.of, run)).removeMetadata(image, remove, run)
  else if (instance === undefined) await changeImageBitmaps(disk.path, { remove }, run)
  // The instance may have been started since.
  else await host.changeBitmaps(instance, [{ disk: { name: disk.disk, path: disk.path }, remove }], run)
}
