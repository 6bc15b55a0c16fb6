import { BackupPipeline, ChainManager, LibvirtHost, RestorePipeline } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'

const [instance = 'web-1', path = '/mnt/backup', stateDir = '/var/lib/varve', uri] = process.argv.slice(2)
const host = new LibvirtHost(uri ? { uri } : {}) // qemu:///system
await using storage = new LocalDriver({ path })

// A full backup of the running VM, then an increment: only what has changed since.
const backups = new BackupPipeline({ host, storage, stateDir })
await backups.run({ instance, type: 'full' })
const latest = await backups.run({ instance }, { onEvent: event => console.log(event) })

// What a retention policy would remove, without removing it.
const chains = new ChainManager({ storage })
const { removed } = await chains.prune({ instance, keepLast: 7, keepWeekly: 4 }, { dryRun: true })
console.log(`${removed.length} backups could go`)

// Over the VM: it is shut down once the new disks are written and verified, and started again.
await new RestorePipeline({ host, storage, stateDir }).run({ backup: latest.id, to: { instance } })
