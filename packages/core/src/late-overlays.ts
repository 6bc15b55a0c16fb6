import { realpath, stat } from 'node:fs/promises'
import { basename } from 'node:path'
import { backupTime, isBackupId } from './backup-id.ts'
import type { DiskOverlay, Host, InstanceDisks } from './host.ts'
import { RunJournal } from './journal.ts'
import { backingOf } from './overlay-base.ts'
import { folderIdentity } from './presence.ts'
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
      const below = await backingOf(overlay, run)
      if (!below) continue
      const base = await realpath(below.name)
      if (!(await isNamedAfter(overlay, { disk, base, backup: id }))) continue
      const folder = await folderIdentity(overlay)
      overlays.push({ disk, overlay, folder, base, baseFormat: below.format })
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

/** Whether an overlay has the name that a backup gives it. A device may have been called otherwise by then. */
async function isNamedAfter(
  overlay: string,
  { disk, base, backup }: { readonly disk: string; readonly base: string; readonly backup: string },
): Promise<boolean> {
  if (basename(overlay) === overlayName(disk, base, backup)) return true
  return overlay.endsWith(overlayName(disk, '', backup)) && (await stat(base)).isBlockDevice()
}
