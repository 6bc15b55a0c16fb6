import { describeDriver } from '@varve/testkit'
import { type RadosgwLab, startRadosgw } from '@varve/testkit/lab'
import { afterAll, beforeAll } from 'vitest'
import { TestBucket } from './s3-target.ts'

const MIB = 1024 * 1024
let gateway: RadosgwLab
let bucket: TestBucket

beforeAll(async () => {
  gateway = await startRadosgw()
  bucket = await TestBucket.make(gateway, await gateway.createUser('varve'))
})
afterAll(() => gateway?.[Symbol.asyncDispose]())

describeDriver('S3Driver', {
  capabilities: {
    rangeRead: true,
    atomicPublish: true,
    resume: true,
    parallelParts: true,
    maxObjectSize: 5 * MIB * MIB,
  },
  create: () => bucket.target(),
  largeSize: 24 * MIB + 12_345,
  manyObjects: 1100, // more than a page
})
