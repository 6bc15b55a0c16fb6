import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { expect, test } from 'vitest'
import { FakeServer, type Twist } from './fake-server.ts'
import { listed } from './ftp-target.ts'

// What others make and remove is refused at one moment and listed at the next: no sign that the user may not have it.

const x = bytesBody(Buffer.from('x'))
const denied = { code: 'STORAGE_ACCESS_DENIED' }

/** Refuses what a pattern matches so often, as if it were not there just then. */
function refusing(times: number, pattern: RegExp, reply = '550 No.'): Twist {
  let left = times
  return argument => (pattern.test(argument) && left-- > 0 ? reply : undefined)
}

async function beginWithObject() {
  const { server, driver } = await FakeServer.begin()
  await driver.put('a/b', x)
  return { server, driver }
}

test('a folder that is away whenever it is entered, and there whenever it is looked for, is listed in the end', async () => {
  const { server, driver } = await beginWithObject()
  server.twists.CWD = refusing(5, /a$/)
  expect(await listed(driver)).toMatchObject([{ key: 'a/b' }])
})

test('a folder that is gone in the end holds nothing', async () => {
  const { server, driver } = await beginWithObject()
  await driver.put('c/d', x)
  let looks = 0
  server.twists.CWD = path => {
    if (!path.endsWith('/a')) return undefined
    if (++looks === 5) {
      server.files.delete('/a/b')
      server.folders.delete('/a')
    }
    return '550 No.'
  }
  expect(await listed(driver)).toMatchObject([{ key: 'c/d' }])
  expect(looks).toBe(5)
})

test.each([
  ['that is removed between its being entered and its being listed', 'LIST', '550 No such file.'],
  ['that is said to be listed and is not', 'end of LIST', '226 Done (but failed to open directory).'],
])('a folder %s is listed in the end, and asked for hidden files ever after', async (_, when, reply) => {
  const { server, driver } = await beginWithObject()
  server.twists[when] = refusing(4, /^/, reply)
  expect(await listed(driver, 'a/')).toMatchObject([{ key: 'a/b' }])
  expect(await listed(driver, 'a/')).toMatchObject([{ key: 'a/b' }])
  expect(server.commands.findLast(line => line.startsWith('LIST'))).toBe('LIST -a')
})

test('an object that is away whenever it is asked for, and listed whenever it is looked for, is found in the end', async () => {
  const { server, driver } = await beginWithObject()
  server.twists.SIZE = refusing(5, /b$/)
  expect(await driver.stat('a/b')).toMatchObject({ size: 1 })
  server.twists.RETR = refusing(5, /b$/)
  expect(await buffer(await driver.get('a/b'))).toHaveLength(1)
  server.twists.DELE = refusing(5, /b$/)
  await driver.delete('a/b')
  expect(server.files.size).toBe(0)
})

test('what is behind a folder that comes and goes is found in the end', async () => {
  const { server, driver } = await beginWithObject()
  server.twists.SIZE = refusing(6, /b$/)
  server.twists.CWD = refusing(6, /a$/)
  expect(await driver.stat('a/b')).toMatchObject({ size: 1 })
})

test('a file is stored in a folder that goes whenever others have made it', async () => {
  const { server, driver } = await beginWithObject()
  server.twists.STOR = refusing(8, /part/)
  await driver.put('a/c', x)
  expect(server.files.size).toBe(2)
})

test('what is there and refused every time is denied', async () => {
  const { server, driver } = await beginWithObject()
  server.twists.CWD = refusing(Number.POSITIVE_INFINITY, /a$/)
  await expect(listed(driver)).rejects.toMatchObject(denied)
  server.twists.SIZE = refusing(Number.POSITIVE_INFINITY, /b$/)
  await expect(driver.stat('a/b')).rejects.toMatchObject(denied)
  delete server.twists.CWD
  await expect(driver.get('a/b')).rejects.toMatchObject(denied)
  server.twists.DELE = refusing(Number.POSITIVE_INFINITY, /b$/)
  await expect(driver.delete('a/b')).rejects.toMatchObject(denied)
  server.twists.LIST = refusing(Number.POSITIVE_INFINITY, /^/)
  await expect(listed(driver)).rejects.toMatchObject(denied)
})

test('an object whose time alone is denied is found and listed without one', async () => {
  const { server, driver } = await beginWithObject()
  server.twists.MDTM = () => '550 Permission denied.'
  expect(await driver.stat('a/b')).toEqual({ key: 'a/b', size: 1 })
  expect(await listed(driver)).toEqual([{ key: 'a/b', size: 1 }])
})
