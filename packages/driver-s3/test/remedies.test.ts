import { bytesBody, type VarveError } from '@varve/core'
import { PatternBody } from '@varve/testkit'
import { expect, test } from 'vitest'
import { begin } from './faulty-s3.ts'

test('listings that do not go on are told with what to look at', async () => {
  const { fake, driver } = await begin({ maxParts: 2, retries: 0 })
  fake.endless = true
  const told = { message: expect.stringMatching(/ Look at the server's log/), context: expect.anything() }
  await expect(driver.list('').next()).rejects.toMatchObject(told)
  await expect(driver.cleanUp({ olderThan: new Date() })).rejects.toMatchObject(told)
})

test('an answer that is not what was asked for is told with what to look at', async () => {
  const { fake, driver } = await begin({ maxParts: 2, retries: 0 })
  await driver.put('a', bytesBody(Buffer.from('0123456789')))
  fake.mostOfRange = 3
  await expect(driver.get('a', { range: { start: 0, end: 8 } })).rejects.toMatchObject({
    code: 'STORAGE_FAILED',
    message: expect.stringMatching(/than the bytes that were asked for\. Look at the server's log/),
  })
})

test('what is larger than any object, or is not there, is told with what to do', async () => {
  const { driver } = await begin({ maxParts: 2, retries: 0 })
  const { maxObjectSize = 0 } = driver.capabilities
  const large = new PatternBody({ size: maxObjectSize + 1 })
  await expect(driver.put('a', large)).rejects.toThrow('Raise maxParts')
  const error: VarveError = await driver.get('a').catch(error => error)
  expect(error).toMatchObject({ code: 'OBJECT_NOT_FOUND', message: expect.stringContaining('Put it back') })
})
