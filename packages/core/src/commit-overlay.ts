import { realpath, rm } from 'node:fs/promises'
import { runCommand } from './command.ts'
import { errorMessage, isVarveError, VarveError } from './errors.ts'
import type { DiskOverlay } from './host.ts'
import type { LibvirtDomains } from './libvirt-domains.ts'
import { readImageInfo } from './qemu-img.ts'
import type { RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'

/** How long a block-commit may take, in milliseconds: a day, as an overlay may be as large as its disk. */
const COMMIT_TIMEOUT_MS = 24 * 60 * 60 * 1000

/**
 * Brings what was written to an overlay back into its base, and the domain back onto the base.
 *
 * @throws BLOCK_COMMIT_FAILED; the overlay is there then, and the domain goes on with it
 */
export async function commitOverlay(
  domains: LibvirtDomains,
  instance: string,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<void> {
  try {
    const state = await domains.diskState(instance, overlay.disk, run)
    if (state === undefined || (!state.running && state.path === overlay.overlay)) {
      if (state && (await domains.hasSavedMemory(instance, run))) {
        // The saved state names the overlay, and the guest could not go on without it.
        throw new VarveError(
          'OVERLAY_LEFT_OVER',
          'the memory of the instance was saved (virsh managedsave) while it wrote to the overlay; start the instance first',
        )
      }
      await commitOffline(domains, instance, overlay, run)
    } else if (state.path === overlay.overlay) await commitLive(domains, instance, overlay, run)
    else if (state.path !== overlay.base && (await statIfThere(overlay.overlay))) {
      // Such as a snapshot that somebody made on top of the overlay: its data is needed, here or there.
      throw new VarveError(
        'OVERLAY_LEFT_OVER',
        `the disk writes to ${state.path} by now, and neither to the overlay nor to ${overlay.base}`,
      )
    } else if (state.running && (await statIfThere(overlay.overlay)))
      await assertUnused(domains, instance, overlay, run)
    await rm(overlay.overlay, { force: true })
  } catch (error) {
    throw new VarveError(
      'BLOCK_COMMIT_FAILED',
      `Block commit failed: the overlay ${overlay.overlay} of disk ${overlay.disk} could not be merged back (${errorMessage(error)}). Nothing is lost as long as the overlay is there: do not delete it. The instance ${instance} goes on. Run "varve recover" once the cause is removed; no backup of this instance starts before.`,
      {
        context: { instance, disk: overlay.disk, overlay: overlay.overlay, base: overlay.base },
        cause: error,
        retryable: true,
      },
    )
  }
}

/**
 * The definition says that the disk is on its base. libvirt may all the same be about to put the overlay on
 * top, for a snapshot that nobody waits for any more: QEMU itself knows, and answers when that is done.
 */
async function assertUnused(
  domains: LibvirtDomains,
  instance: string,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<void> {
  if (!(await domains.qmp(instance, run)).uses(overlay.overlay)) return
  throw new VarveError('OVERLAY_LEFT_OVER', 'a snapshot is about to take it into use')
}

async function commitLive(
  domains: LibvirtDomains,
  instance: string,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<void> {
  // --shallow: into the overlay's own base, never further down a chain that the instance has of its own.
  const options = ['--active', '--shallow', '--pivot', '--wait']
  const slow = { ...run, timeoutMs: COMMIT_TIMEOUT_MS }
  const commit = () => domains.virsh.onDomain(slow, instance, 'blockcommit', overlay.disk, ...options)
  await commit().catch(async error => {
    if (!isVarveError(error, 'COMMAND_FAILED')) throw error
    // A job that a former try left behind refuses a new one.
    const job = await domains.virsh.onDomain(run, instance, 'blockjob', overlay.disk, '--info')
    if (!/commit/i.test(job)) throw error
    await domains.virsh.onDomain(run, instance, 'blockjob', overlay.disk, '--abort')
    await commit()
  })
  const after = await domains.diskState(instance, overlay.disk, run)
  if (after?.path !== overlay.base) {
    throw new VarveError(
      'BLOCK_COMMIT_FAILED',
      `${overlay.disk} is on ${after?.path ?? 'no file'} instead of ${overlay.base}`,
    )
  }
}

/** The domain does not run (any more), or is gone. */
async function commitOffline(
  domains: LibvirtDomains,
  instance: string,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<void> {
  if (!(await statIfThere(overlay.overlay))) return
  const info = await readImageInfo(overlay.overlay, 'qcow2', run)
  if (info.backing === undefined || (await realpath(info.backing)) !== overlay.base) {
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `its backing file is ${info.backing ?? 'none'}, not ${overlay.base}`,
    )
  }
  await runCommand('qemu-img', ['commit', '-f', 'qcow2', '-d', overlay.overlay], {
    ...run,
    timeoutMs: COMMIT_TIMEOUT_MS,
  })
  const base = { path: overlay.base, format: overlay.baseFormat }
  await domains.redefine(instance, { disks: { [overlay.disk]: base } }, run).catch(error => {
    if (!isVarveError(error, 'INSTANCE_NOT_FOUND')) throw error // a transient domain is gone once it stops
  })
  const now = await domains.diskState(instance, overlay.disk, run)
  if (now?.running && now.path === overlay.overlay)
    throw new VarveError('OVERLAY_LEFT_OVER', 'the instance was started on it meanwhile')
}
