import { describeDriver } from '@varve/testkit'
import { type SshdLab, startSshd } from '@varve/testkit/lab'
import { afterAll, beforeAll } from 'vitest'
import { sftpTarget } from './sftp-target.ts'

let lab: SshdLab

beforeAll(async () => {
  lab = await startSshd()
})

afterAll(() => lab[Symbol.asyncDispose]())

describeDriver('SftpDriver', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: true, parallelParts: false },
  create: () => sftpTarget(lab),
  largeSize: 24 * 1024 * 1024 + 12345,
  manyObjects: 1000,
})
