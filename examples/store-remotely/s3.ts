/**
 * Backs an instance up to a bucket. The keys are in the environment: S3_ACCESS_KEY, S3_SECRET_KEY.
 *
 *     tsx s3.ts web-1 https://s3.example.com backups
 */
import { BackupPipeline, LibvirtHost } from '@varve/core'
import { S3Driver } from '@varve/driver-s3'

const [instance, endpoint, bucket, stateDir = '/var/lib/varve', uri] = process.argv.slice(2)
if (!instance || !endpoint || !bucket) throw new Error('Usage: s3 INSTANCE ENDPOINT BUCKET')
const { S3_ACCESS_KEY: accessKey = '', S3_SECRET_KEY: secretKey = '' } = process.env

await using storage = new S3Driver({ endpoint, bucket, accessKey, secretKey, pathPrefix: 'varve' })

// Reaches the bucket, then writes, reads back, lists and deletes a probe; says what is wrong, and what to do.
const { ok, checks } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)

// The first backup of a VM is full, later ones hold what has changed since.
const host = new LibvirtHost(uri ? { uri } : {}) // qemu:///system
const { id } = await new BackupPipeline({ host, storage, stateDir }).run({ instance })
console.log(`${id} is in ${storage.location}`)

// What killed processes left of unfinished uploads a day ago or longer takes space and is in no listing.
const removed = await storage.cleanUp({ olderThan: new Date(Date.now() - 24 * 3_600_000) })
console.log(`${removed} unfinished uploads removed`)
