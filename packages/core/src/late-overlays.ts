import { realpath } from 'node:fs/promises'
import { basename } from 'node:path'
import { z } from 'zod'
import { backupTime, isBackupId } from './backup-id.ts'
import { runCommand } from './command.ts'
import type { DiskOverlay, Host, InstanceDisks } from './host.ts'
import { RunJournal } from './journal.ts'
import type { RunOptions } from './run-options.ts'
import type { StorageDriver } from './storage.ts'

const OVERLAY = /\.varve-([^.]+)$/

/** What the overlay of a disk is called that a backup makes. */
export function overlayName(disk: string, base: string, backup: string): string {
  return `${basename(base)}.${disk}.varve-${backup}`
}

/** The backup that an overlay was made for; undefined for any other file. */
export function backupOfOverlay(path: string): string | undefined {
  const id = OVERLAY.exec(path)?.[1]
  return id !== undefined && isBackupId(id) ? id : undefined
}

/** What {@link recordLateOverlays} works with. */
export interface LateOverlayOptions {
  readonly host: Host
  readonly storage: StorageDriver
  readonly stateDir: string
  readonly run: RunOptions
}

/**
 * Writes the journal anew of a run whose overlays an instance is on although it has none any more, so that `recover` merges
 * them: libvirt may make a snapshot at any time after the process died that asked for it, also when that run is settled.
 * To be called with the overlays held, so that no run that lives has made them.
 */
export async function recordLateOverlays(
  { name: instance, disks }: InstanceDisks,
  { host, storage, stateDir, run }: LateOverlayOptions,
): Promise<void> {
  const known = await RunJournal.unsettled(stateDir)
  for (const [id, found] of Map.groupBy(disks, ({ path }) => backupOfOverlay(path))) {
    if (id === undefined || known.includes(id)) continue
    const overlays: DiskOverlay[] = []
    for (const { name: disk, path: overlay } of found) {
      const base = await baseOf(overlay, run)
      if (base && basename(overlay) === overlayName(disk, base.base, id))
        overlays.push({ disk, overlay, ...base })
    }
    if (overlays.length === 0) continue // not made by a backup, or changed since
    const journal = await RunJournal.begin(stateDir, {
      version: 1,
      id,
      kind: 'backup',
      instance,
      host: host.reference,
      storage: { type: storage.type, location: storage.location },
      disks: overlays.map(({ disk, base }) => ({ name: disk, path: base })),
      startedAt: backupTime(id).toISOString(),
    })
    await journal.record({ step: 'snapshot', overlays })
  }
}

const backing = z.object({
  'full-backing-filename': z.string(),
  'backing-filename-format': z.enum(['qcow2', 'raw']),
})

/** The file below an overlay that is in use; undefined where it has none that a disk could be put on. */
async function baseOf(
  overlay: string,
  run: RunOptions,
): Promise<Pick<DiskOverlay, 'base' | 'baseFormat'> | undefined> {
  const args = ['info', '--force-share', '--output=json', '-f', 'qcow2', overlay]
  const { stdout } = await runCommand('qemu-img', args, run)
  const { data } = backing.safeParse(JSON.parse(stdout))
  if (!data) return undefined
  const base = await realpath(data['full-backing-filename'])
  return { base, baseFormat: data['backing-filename-format'] }
}
