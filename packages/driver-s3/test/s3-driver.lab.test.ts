import { readFile } from 'node:fs/promises'
import { buffer } from 'node:stream/consumers'
import { fileURLToPath } from 'node:url'
import { HeadObjectCommand, PutBucketPolicyCommand, PutBucketVersioningCommand } from '@aws-sdk/client-s3'
import { bytesBody } from '@varve/core'
import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { PatternBody, patternBytes } from '@varve/testkit'
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
  for (const ca of [gateway.caFile, await readFile(gateway.caFile, 'utf8')]) {
    await using driver = new S3Driver({ ...bucket.options, endpoint, ca, pathPrefix: 'tls' })
    const body = new PatternBody({ size: 6 * MIB, seed: 1 })
    await driver.put('object', body)
    expect(body.faults).toEqual([])
    expect((await buffer(await driver.get('object'))).equals(patternBytes(1, 0, 6 * MIB))).toBe(true)
  }
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

test('an object has as many parts as its plan, and the id of its upload', async () => {
  await using driver = new S3Driver({ ...bucket.options, maxParts: 3, pathPrefix: 'parts' })
  await driver.put('object', new PatternBody({ size: 17 * MIB }))
  const head = await bucket.client.send(new HeadObjectCommand({ Bucket: bucket.name, Key: 'parts/object' }))
  expect(head.ETag).toMatch(/-3"$/)
  expect(head.Metadata).toHaveProperty('varve-upload')
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
})

test('an upload takes little memory, or that of its largest part where it opens once', async () => {
  const script = fileURLToPath(new URL('./measure-uploads.ts', import.meta.url))
  const options = { ...bucket.options, pathPrefix: 'memory' }
  const { stdout } = await execa(process.execPath, ['--import', 'tsx', script], {
    env: { VARVE_TEST: JSON.stringify(options) },
  })
  const taken: { body: number; stream: number } = JSON.parse(stdout)
  expect(taken.body, 'MiB').toBeLessThan(40)
  expect(taken.stream, 'MiB').toBeGreaterThan(90)
  expect(taken.stream, 'MiB').toBeLessThan(140)
  expect(await inBucket(bucket.client, bucket.name, 'memory/')).toEqual([
    { name: 'body', size: 200 * MIB },
    { name: 'small', size: 1000 },
    { name: 'stream', size: 240 * MIB },
  ])
})
