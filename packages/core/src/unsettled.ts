import { VarveError } from './errors.ts'
import { RunJournal } from './journal.ts'

/**
 * Refuses disks on which a run was cut short. To be called with the disks held: the run is then known to be
 * dead.
 *
 * @throws RUN_UNRESOLVED
 */
export async function assertNoUnsettledRun(
  stateDir: string,
  disks: readonly { readonly path: string }[],
): Promise<void> {
  const paths = new Set(disks.map(({ path }) => path))
  for (const { header } of await RunJournal.unsettled(stateDir)) {
    const disk = header.disks.find(({ path }) => paths.has(path))
    if (!disk) continue
    throw new VarveError(
      'RUN_UNRESOLVED',
      `The ${header.kind} ${header.id} of ${header.instance} was cut short on the disk ${disk.name} (${disk.path}). Run "varve recover" first.`,
      {
        context: {
          run: header.id,
          kind: header.kind,
          instance: header.instance,
          disk: disk.name,
          path: disk.path,
        },
      },
    )
  }
}
