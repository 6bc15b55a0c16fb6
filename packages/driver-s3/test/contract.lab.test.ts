import { randomBytes } from 'node:crypto'
import { appendFile } from 'node:fs/promises'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { describeDriver, NetworkProxy } from '@varve/testkit'
import { type CephLab, type RadosgwLab, type S3User, startCeph, startRadosgw } from '@varve/testkit/lab'
import { isThorough } from '@varve/testkit/thorough'
import { afterAll, beforeAll } from 'vitest'
import { TestBucket } from './s3-target.ts'

const MIB = 1024 * 1024
const CAPACITY = 8 * MIB
/** Of a listing. The gateway's own are of 1000 objects, which take a while to be stored. */
const PAGE = 80
let ceph: CephLab
let gateway: RadosgwLab
let bucket: TestBucket
let stranger: S3User
const secrets: string[] = []

beforeAll(async () => {
  ceph = await startCeph()
  await appendFile(ceph.conf, `\n[client.rgw]\nrgw_max_listing_results = ${PAGE}\n`)
  gateway = await startRadosgw(ceph)
  const user = await gateway.createUser('varve')
  bucket = await TestBucket.make(gateway, user)
  stranger = await gateway.createUser('stranger')
  secrets.push(user.secretKey)
})
afterAll(async () => {
  await gateway?.[Symbol.asyncDispose]()
  await ceph?.[Symbol.asyncDispose]()
})

const refused = async (options: Partial<S3DriverOptions>) =>
  new S3Driver({ ...bucket.options, retries: 1, ...options })

describeDriver('S3Driver', {
  capabilities: {
    rangeRead: true,
    atomicPublish: true,
    resume: true,
    parallelParts: true,
    maxObjectSize: 5 * MIB * MIB,
    maxStreamSize: 828_000 * MIB,
  },
  create: () => bucket.target(),
  leaveUnfinished: target => bucket.leaveUnfinished(target),
  neighbour: async ({ pathPrefix }) => new S3Driver({ ...bucket.options, pathPrefix: `${pathPrefix}2` }),
  async createFull() {
    const user = await gateway.createUser(`full-${randomBytes(4).toString('hex')}`)
    const quota = ['--quota-scope', 'bucket', '--uid', user.uid]
    await gateway.admin('quota', 'set', ...quota, '--max-size', String(CAPACITY))
    await gateway.admin('quota', 'enable', ...quota)
    const small = await TestBucket.make(gateway, user)
    // the gateway counts a part when it is stored, so that several at once may pass together
    return { ...(await small.target({ parallelParts: 1 })), capacity: CAPACITY }
  },
  largeSize: (isThorough ? 24 : 12) * MIB + 12_345, // three parts; two where its size is not known
  streamSize: 18_000_000, // the first part, of 8 MiB, is in its first half
  manyObjects: 2.5 * PAGE,
  turns: isThorough ? 25 : 5, // the gateway has no folders that come and go
  brief: true,
  remote: {
    async create() {
      const proxy = await NetworkProxy.start(gateway)
      const endpoint = `http://127.0.0.1:${proxy.port}`
      const target = await bucket.target({ endpoint, timeoutMs: 1500, retries: 1 })
      const dispose = async () => {
        await target.dispose()
        await proxy[Symbol.asyncDispose]()
      }
      return { ...target, proxy, dispose }
    },
    restartServer: () => gateway.restart(),
    cutSize: 6_000_003, // two parts
    refused: [
      {
        what: 'a wrong secret key',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => refused({ secretKey: 'not-the-secret' }),
      },
      {
        what: 'an unknown access key',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => refused({ accessKey: 'UNKNOWN' }),
      },
      {
        what: 'a user without rights',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => refused({ accessKey: stranger.accessKey, secretKey: stranger.secretKey }),
      },
      {
        what: 'a missing bucket',
        code: 'STORAGE_NOT_FOUND',
        create: () => refused({ bucket: 'no-such-bucket-here' }),
      },
      {
        what: 'a certificate of an unknown authority',
        code: 'STORAGE_UNREACHABLE',
        create: () => refused({ endpoint: `https://127.0.0.1:${gateway.tlsPort}` }),
      },
    ],
    secrets,
  },
})
