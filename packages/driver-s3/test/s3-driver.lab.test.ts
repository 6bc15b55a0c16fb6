import { readFile } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import {
  CreateMultipartUploadCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  ListPartsCommand,
  PutBucketPolicyCommand,
  PutBucketVersioningCommand,
  PutObjectCommand,
  UploadPartCommand,
} from '@aws-sdk/client-s3'
import { bytesBody, type UploadBody } from '@varve/core'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { NetworkProxy, PatternBody, patternBytes } from '@varve/testkit'
import { type RadosgwLab, type S3User, startRadosgw } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { inBucket, TestBucket } from './s3-target.ts'

const MIB = 1024 * 1024
let gateway: RadosgwLab
let owner: S3User
let bucket: TestBucket

beforeAll(async () => {
  gateway = await startRadosgw()
  owner = await gateway.createUser('varve')
  bucket = await TestBucket.make(gateway, owner)
})
afterAll(() => gateway?.[Symbol.asyncDispose]())

async function checkOf(options: Partial<S3DriverOptions>) {
  await using driver = new S3Driver({ ...bucket.options, retries: 1, timeoutMs: 2000, ...options })
  const { checks } = await driver.check()
  return checks
}

function failed(name: string, ...texts: string[]) {
  const message = texts.map(text => `(?=.*${text})`).join('')
  return expect.objectContaining({ name, ok: false, message: expect.stringMatching(new RegExp(message)) })
}

test('https is trusted by the authority that is given, as a file or as text', async () => {
  const endpoint = `https://127.0.0.1:${gateway.tlsPort}`
  const options = { ...bucket.options, endpoint, pathPrefix: 'tls' }
  await using driver = new S3Driver({ ...options, ca: gateway.caFile })
  const body = new PatternBody({ size: 6 * MIB, seed: 1 })
  await driver.put('object', body)
  expect(body.faults).toEqual([])
  await using other = new S3Driver({ ...options, ca: await readFile(gateway.caFile, 'utf8') })
  expect((await buffer(await other.get('object'))).equals(patternBytes(1, 0, 6 * MIB))).toBe(true)
})

test('a check tells apart why a storage cannot be used', async () => {
  expect(await checkOf({ endpoint: 'http://no-such-host.invalid' })).toEqual([
    failed('connect', 'host is unknown|name service'),
  ])
  expect(await checkOf({ endpoint: 'http://127.0.0.1:1' })).toEqual([failed('connect', 'refused')])
  expect(await checkOf({ endpoint: `https://127.0.0.1:${gateway.tlsPort}` })).toEqual([
    failed('connect', 'TLS'),
  ])
  expect(await checkOf({ endpoint: `https://127.0.0.1:${gateway.port}` })).toEqual([failed('connect', 'TLS')])
  expect(await checkOf({ secretKey: 'wrong' })).toEqual([
    failed('connect', 'credentials', 'SignatureDoesNotMatch'),
  ])
  expect(await checkOf({ accessKey: 'UNKNOWN' })).toEqual([
    failed('connect', 'credentials', 'InvalidAccessKeyId'),
  ])
  expect(await checkOf({ bucket: 'none-of-that-name' })).toEqual([failed('connect', 'bucket is not there')])
})

test('a check names the permission that is missing', async () => {
  const guest = await gateway.createUser('guest')
  const theirs = { accessKey: guest.accessKey, secretKey: guest.secretKey }
  expect(await checkOf(theirs)).toEqual([failed('connect', 's3:ListBucket')])
  const allow = async (...actions: string[]) => {
    const Policy = JSON.stringify({
      Version: '2012-10-17',
      Statement: [
        {
          Effect: 'Allow',
          Principal: { AWS: ['arn:aws:iam:::user/guest'] },
          Action: actions,
          Resource: [`arn:aws:s3:::${bucket.name}`, `arn:aws:s3:::${bucket.name}/*`],
        },
      ],
    })
    await bucket.client.send(new PutBucketPolicyCommand({ Bucket: bucket.name, Policy }))
  }
  await allow('s3:ListBucket')
  expect(await checkOf({ ...theirs, pathPrefix: 'guest' })).toEqual([
    { name: 'connect', ok: true },
    failed('write', 's3:PutObject'),
  ])
  await allow('s3:ListBucket', 's3:PutObject', 's3:GetObject')
  const checks = await checkOf({ ...theirs, pathPrefix: 'guest' })
  expect(checks.at(-1)).toEqual(failed('delete', 's3:DeleteObject'))
  expect(checks.slice(0, -1).every(({ ok }) => ok)).toBe(true)
})

test('the policy in the documentation allows all that the driver does, and each action of it is needed', async () => {
  const own = await TestBucket.make(gateway, owner)
  const { accessKey, secretKey } = await gateway.createUser('least')
  const allow = async (statements: readonly { Action: string[]; Resource: string }[]) => {
    const Statement = statements.map(({ Action, Resource }) => ({
      Effect: 'Allow',
      Principal: { AWS: ['arn:aws:iam:::user/least'] },
      Action,
      Resource: Resource.replace(':::backups', `:::${own.name}`),
    }))
    const Policy = JSON.stringify({ Version: '2012-10-17', Statement })
    await own.client.send(new PutBucketPolicyCommand({ Bucket: own.name, Policy }))
  }
  const useAll = async () => {
    const target = await own.target({ accessKey, secretKey, retries: 0 })
    const { driver, inspect } = target
    const { ok, checks } = await driver.check()
    if (!ok) throw new Error(checks.at(-1)?.message)
    await driver.put('large', new PatternBody({ size: 6 * MIB }))
    const broken: UploadBody = { size: 6 * MIB, replayable: true, open: () => Readable.from(['short']) }
    await expect(driver.put('broken', broken)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    if ((await inspect()).length > 1) throw new Error('a failed upload was not removed')
    await own.leaveUnfinished(target)
    const removed = await driver.cleanUp?.({ olderThan: new Date(Date.now() + 60_000) })
    if (removed !== 1) throw new Error(`clean-up removed ${removed}`)
    await driver[Symbol.asyncDispose]()
    await using reader = new S3Driver({ ...own.options, accessKey, secretKey, pathPrefix: 'some' })
    await buffer(await reader.get('object')) // whoever wrote an object may read it at this gateway
  }
  const at = { Bucket: own.name, Key: 'some/object' }
  await own.client.send(new PutObjectCommand({ ...at, Body: "the owner's" }))

  const page = await readFile(new URL('../../../docs/driver-s3.md', import.meta.url), 'utf8')
  const [, text = ''] = /## Permissions[\s\S]*?```json\n([\s\S]*?)```/.exec(page) ?? []
  const policy: { Statement: { Action: string[]; Resource: string }[] } = JSON.parse(
    text.replaceAll('/varve/*', '/some/*'),
  )
  await allow(policy.Statement)
  await useAll()
  const actions = policy.Statement.flatMap(({ Action }) => Action)
  expect(actions).toHaveLength(7)
  const needless: string[] = []
  for (const left of actions) {
    await allow(
      policy.Statement.map(({ Action, Resource }) => ({
        Action: Action.filter(action => action !== left),
        Resource,
      })),
    )
    await useAll().then(
      () => needless.push(left),
      () => undefined,
    )
  }
  expect(needless).toEqual([])
})

test('an object has as many parts as its plan, and the id of its upload', async () => {
  await using driver = new S3Driver({ ...bucket.options, maxParts: 3, pathPrefix: 'parts' })
  await driver.put('object', new PatternBody({ size: 17 * MIB }))
  const head = await bucket.client.send(new HeadObjectCommand({ Bucket: bucket.name, Key: 'parts/object' }))
  expect(head.ETag).toMatch(/-3"$/)
  expect(head.Metadata).toHaveProperty('varve-upload')
})

test('clean-up removes what is stale under its own prefix, and nothing else', async () => {
  const began = new Date()
  const begin = async (Key: string) => {
    const at = { Bucket: bucket.name, Key }
    const { UploadId = '' } = await bucket.client.send(new CreateMultipartUploadCommand(at))
    await bucket.client.send(new UploadPartCommand({ ...at, UploadId, PartNumber: 1, Body: 'part' }))
    return { ...at, UploadId }
  }
  const stale = await begin('clean/a/stale')
  const others = [await begin('clean2/theirs'), await begin('cleaner'), await begin('elsewhere')]
  await using driver = new S3Driver({ ...bucket.options, pathPrefix: 'clean' })
  await using upper = new S3Driver({ ...bucket.options, pathPrefix: 'clean/a' })
  const unfinished = async () => {
    const { Uploads = [] } = await bucket.client.send(
      new ListMultipartUploadsCommand({ Bucket: bucket.name }),
    )
    return Uploads.map(({ Key }) => Key).sort()
  }

  expect(await driver.cleanUp({ olderThan: new Date(began.getTime() - 1000) })).toBe(0)
  expect(await unfinished()).toEqual(['clean/a/stale', 'clean2/theirs', 'cleaner', 'elsewhere'])
  const later = new Date(Date.now() + 60_000)
  expect(await driver.cleanUp({ olderThan: later })).toBe(1)
  expect(await upper.cleanUp({ olderThan: later })).toBe(0)
  expect(await unfinished()).toEqual(['clean2/theirs', 'cleaner', 'elsewhere'])
  await expect(bucket.client.send(new ListPartsCommand(stale))).rejects.toThrow(/NoSuch|Unknown/)
  for (const other of others) {
    const { Parts } = await bucket.client.send(new ListPartsCommand(other))
    expect(Parts).toMatchObject([{ Size: 4 }])
  }
})

test('uploads that somebody else removes meanwhile do not disturb a clean-up', async () => {
  const target = await bucket.target()
  const { driver, inspect } = target
  for (let upload = 0; upload < 10; upload++) await bucket.leaveUnfinished(target)
  const olderThan = new Date(Date.now() + 60_000)
  await Promise.all(Array.from({ length: 4 }, () => driver.cleanUp?.({ olderThan })))
  expect(await inspect()).toEqual([])
  await driver[Symbol.asyncDispose]()
})

test('a put that was given up has no part left at the gateway when it rejects', async () => {
  const alone = await TestBucket.make(gateway, owner)
  await using proxy = await NetworkProxy.start(gateway)
  const endpoint = `http://127.0.0.1:${proxy.port}`
  await using driver = new S3Driver({ ...alone.options, endpoint, pathPrefix: 'given-up' })
  const controller = new AbortController()
  let parts = 0
  const upload = driver.put('object', new PatternBody({ size: 40 * MIB }), {
    signal: controller.signal,
    onProgress: bytes => {
      if (bytes < 20 * MIB || controller.signal.aborted) return
      parts = Math.floor(bytes / (5 * MIB))
      proxy.latencyMs = 1000 // who does not wait for the removal is done long before it
      controller.abort()
    },
  })
  await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
  const { Uploads = [] } = await alone.client.send(new ListMultipartUploadsCommand({ Bucket: alone.name }))
  expect(Uploads).toEqual([])
  expect(parts).toBeGreaterThan(1)
  // the gateway's index of the bucket, which holds each part that is stored
  const entries: unknown = JSON.parse(await gateway.admin('bi', 'list', '--bucket', alone.name))
  expect(entries).toEqual([])
})

test('a bucket that keeps versions takes, replaces and deletes objects', async () => {
  const versioned = await TestBucket.make(gateway, owner)
  await versioned.client.send(
    new PutBucketVersioningCommand({
      Bucket: versioned.name,
      VersioningConfiguration: { Status: 'Enabled' },
    }),
  )
  const { driver } = await versioned.target()
  await driver.put('a', bytesBody(Buffer.from('former')))
  await driver.put('a', bytesBody(Buffer.from('new')))
  expect((await buffer(await driver.get('a'))).toString()).toBe('new')
  await driver.delete('a')
  await driver.delete('a')
  expect(await driver.stat('a')).toBeUndefined()
  await driver[Symbol.asyncDispose]()
})

test('a gateway that does not know the checksum in the trailer refuses the upload and keeps nothing', async () => {
  await using driver = new S3Driver({
    ...bucket.options,
    checksums: 'WHEN_SUPPORTED',
    retries: 1,
    pathPrefix: 'crc',
  })
  await expect(driver.put('a', new PatternBody({ size: 100_000 }))).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringContaining('WHEN_REQUIRED'),
  })
  expect(await inBucket(bucket.client, bucket.name, 'crc/')).toEqual([])

  await using other = new S3Driver({ ...bucket.options, pathPrefix: 'crc' })
  const { ok, notice } = await other.check()
  expect({ ok, notice }).toEqual({ ok: true, notice: undefined })
  expect(await inBucket(bucket.client, bucket.name, 'crc/')).toEqual([])
})

test('an upload takes little memory, or that of its largest part where it opens once', async () => {
  const script = fileURLToPath(new URL('./measure-uploads.ts', import.meta.url))
  const options = { ...bucket.options, pathPrefix: 'memory' }
  const { stdout } = await execa(process.execPath, [script], {
    env: { VARVE_TEST: JSON.stringify(options) },
  })
  const taken: { body: number; stream: number } = JSON.parse(stdout)
  expect(taken.body, 'MiB').toBeLessThan(40)
  expect(taken.stream, 'MiB').toBeGreaterThan(90)
  expect(taken.stream, 'MiB').toBeLessThan(140)
  expect(await inBucket(bucket.client, bucket.name, 'memory/')).toEqual([
    { name: 'body', size: 100 * MIB },
    { name: 'small', size: 1000 },
    { name: 'stream', size: 240 * MIB },
  ])
})
