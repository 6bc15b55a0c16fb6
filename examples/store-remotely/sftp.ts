/**
 * Backs an instance up to a folder of an SFTP server.
 *
 *     tsx sftp.ts web-1 sftp://varve@backup.example.org /etc/varve/id_ed25519 /etc/ssh/ssh_known_hosts
 */
import { readFile } from 'node:fs/promises'
import { BackupPipeline, LibvirtHost } from '@varve/core'
import { SftpDriver } from '@varve/driver-sftp'

const [instance, address, keyFile, knownHosts, stateDir = '/var/lib/varve', uri] = process.argv.slice(2)
if (!instance || !address || !keyFile || !knownHosts) {
  throw new Error('Usage: sftp INSTANCE ADDRESS KEY_FILE KNOWN_HOSTS_FILE')
}
const { hostname, port, username } = new URL(address)

await using storage = new SftpDriver({
  host: hostname,
  port: Number(port || 22),
  username,
  privateKey: await readFile(keyFile, 'utf8'), // or: password
  pathPrefix: 'backups', // below the folder in which a login begins
  create: true,
  knownHosts, // or: hostKey: 'SHA256:…'
})

// Logs in, then writes, reads back, lists and deletes a small object; says what is wrong, and what to do.
const { ok, checks, freeBytes } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)
console.log(`${freeBytes ?? 'unknown'} bytes are free`)

// A connection that breaks meanwhile is made anew, and the upload goes on where it was.
const host = new LibvirtHost(uri ? { uri } : {}) // qemu:///system
const backups = new BackupPipeline({ host, storage, stateDir })
const { id } = await backups.run({ instance }, { onEvent: event => console.log(event) })
console.log(`${id} is on ${storage.location}`)
