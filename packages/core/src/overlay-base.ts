import { realpath } from 'node:fs/promises'
import { z } from 'zod'
import { formatOf } from './backing-chain.ts'
import { fileIdentity } from './bitmap-twin.ts'
import { runCommand } from './command.ts'
import { type DiskSource, readDomainXml } from './domain-xml.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { DiskOverlay } from './host.ts'
import type { LibvirtDomains } from './libvirt-domains.ts'
import type { RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'

/** An overlay whose base is where that is by now. */
export interface LocatedOverlay extends DiskOverlay {
  /** How the disk is to be defined once it is on its base again. */
  readonly source: DiskSource
}

/**
 * Finds the base of an overlay. A file is where it was. A device may have another number since the host booted, and another
 * device its old one: it is where the name leads that the definition has, which libvirt has written into the overlay too.
 *
 * @throws OVERLAY_LEFT_OVER where that is another device by now
 */
export async function locateBase(
  domains: LibvirtDomains,
  overlay: DiskOverlay,
  run: RunOptions,
): Promise<LocatedOverlay> {
  const { definition, device, base, baseFormat: format } = overlay
  const blockDevice = device !== undefined || !(await statIfThere(base))?.isFile()
  const name = blockDevice ? await deviceName(domains, overlay, run) : base
  const source = definition === undefined ? { path: name, format, blockDevice } : { definition }
  if (!blockDevice) return { ...overlay, source }
  const now = await realpath(name).catch(() => name)
  if (device !== undefined && (await statIfThere(now)) && (await fileIdentity(now)) !== device) {
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `${name} is another device by now than the one which the overlay was made on; have the name lead to that one again`,
    )
  }
  return { ...overlay, base: now, source }
}

async function deviceName(
  domains: LibvirtDomains,
  { definition, overlay, base }: DiskOverlay,
  run: RunOptions,
): Promise<string> {
  const disk = definition === undefined ? undefined : readDomainXml(definition).disks[0]
  if (disk) return (await domains.sourcePath(disk, run)) ?? base
  const backing = (await statIfThere(overlay)) && (await backingOf(overlay, run))
  return backing?.name ?? base
}

const backing = z.object({
  'full-backing-filename': z.string(),
  'backing-filename-format': z
    .string()
    .transform(formatOf)
    .pipe(z.enum(['qcow2', 'raw'])),
})

/** What an overlay, be it in use, says of the file below it; undefined where it has none that a disk could be put on. */
export async function backingOf(
  overlay: string,
  run: RunOptions,
): Promise<{ readonly name: string; readonly format: 'qcow2' | 'raw' } | undefined> {
  const args = ['info', '--force-share', '--output=json', '-f', 'qcow2', overlay]
  const info = await runCommand('qemu-img', args, run).catch(error => {
    if (isVarveError(error, 'COMMAND_FAILED')) return undefined // libvirt died while it made it
    throw error
  })
  const { data } = backing.safeParse(info && JSON.parse(info.stdout))
  return data && { name: data['full-backing-filename'], format: data['backing-filename-format'] }
}
