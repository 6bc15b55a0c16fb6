/**
 * Restores the newest backup of an instance to new images, without touching the instance: after everything
 * was verified, and with each disk as a raw image in a folder.
 *
 *     tsx restore-to-new-image.ts web-1 /mnt/backup /srv/restored
 */
import { join } from 'node:path'
import { ChainManager, LibvirtHost, RestorePipeline } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'

const [instance, path, target, stateDir = '/var/lib/varve'] = process.argv.slice(2)
if (!instance || !path || !target) throw new Error('Usage: restore-to-new-image INSTANCE STORAGE FOLDER')

await using storage = new LocalDriver({ path })
const chains = new ChainManager({ storage })
const { backups, damaged } = await chains.list({ instance })
for (const { key, error } of damaged) console.error(`${key}: ${error.message}`)
const newest = backups.at(-1)?.manifest
if (!newest) throw new Error(`${path} holds no backup of ${instance}.`)

const report = await chains.verify(newest.id, { deep: true })
for (const { message } of report.problems) console.error(message)
if (!report.ok) throw new Error(`The backup ${newest.id} is damaged.`)

const disks = Object.fromEntries(newest.disks.map(({ name }) => [name, join(target, `${name}.raw`)]))
const restore = new RestorePipeline({ host: new LibvirtHost(), storage, stateDir })
const result = await restore.run({ backup: newest.id, to: { disks, format: 'raw' } })
for (const disk of result.disks) console.log(`${disk.name}: ${disk.path}, ${disk.virtualSize} bytes`)
