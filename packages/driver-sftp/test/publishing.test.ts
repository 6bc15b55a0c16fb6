import { buffer } from 'node:stream/consumers'
import { setTimeout as delay } from 'node:timers/promises'
import { bytesBody } from '@varve/core'
import ssh2 from 'ssh2'
import { describe, expect, test } from 'vitest'
import { FakeServer } from './fake-server.ts'

const { FAILURE, NO_SUCH_FILE, PERMISSION_DENIED } = ssh2.utils.sftp.STATUS_CODE
const FORMER = Buffer.from('the former')
const NEW = Buffer.from('the new one')

describe('an object that is replaced on a server that renames over nothing', () => {
  test('is the new one, and nothing else stays', async () => {
    const { server, driver } = await replacing()
    await driver.put('a/b', bytesBody(NEW))
    expect([...server.files]).toEqual([['/a/b', NEW]])
  })

  test('stays where the new one does not get its name', async () => {
    const { server, driver } = await replacing()
    server.twists.RENAME = (from = '') => (from === temporary(server, NEW) ? FAILURE : undefined)
    await expect(driver.put('a/b', bytesBody(NEW))).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
    expect([...server.files]).toEqual([['/a/b', FORMER]])
  })

  test('stays under a name that the error tells where it does not get its own back', async () => {
    const { server, driver } = await replacing()
    server.twists.RENAME = (_, to) => (to === '/a/b' ? FAILURE : undefined)
    const error = await driver.put('a/b', bytesBody(NEW)).catch(error => error)
    expect([...server.files]).toEqual([[expect.stringMatching(/^\/a\/\.varve-part-/), FORMER]])
    expect(error).toMatchObject({
      code: 'STORAGE_FAILED',
      message: expect.stringContaining(`kept as ${temporary(server, FORMER)?.slice(1)}`),
    })
  })

  test('is the new one where the connection breaks in between', async () => {
    const { server, driver } = await replacing()
    let cut = false
    server.twists.RENAME = (_, to = '') => {
      if (cut || to !== '/a/b' || server.files.has(to)) return undefined
      cut = true
      server.cut()
      return 'silence'
    }
    await driver.put('a/b', bytesBody(NEW))
    expect(cut).toBe(true)
    expect([...server.files]).toEqual([['/a/b', NEW]])
  })

  test('is one of many that are put at once', async () => {
    const { server, driver } = await replacing()
    const bodies = Array.from({ length: 8 }, (_, index) => Buffer.from(`body ${index}`))
    await Promise.all(bodies.map(bytes => driver.put('a/b', bytesBody(bytes))))
    expect([...server.files.keys()]).toEqual(['/a/b'])
    const stored = await buffer(await driver.get('a/b'))
    expect(bodies.some(bytes => bytes.equals(stored))).toBe(true)
  })
})

test('a rename may take as long as a flush while the server itself is there', async () => {
  const timeoutMs = 200
  const { server, driver } = await FakeServer.begin({ timeoutMs, retries: 0 })
  let renames = 0
  server.twists.RENAME = async () => {
    renames++
    await delay(5 * timeoutMs)
    return undefined
  }
  await driver.put('a/b', bytesBody(NEW))
  expect(renames).toBe(1)
})

describe('a rename whose answer is lost', () => {
  test('and that is carried out just before it is made again is a success', async () => {
    const { server, driver } = await FakeServer.begin()
    let renames = 0
    server.twists.RENAME = (from = '', to = '') => {
      if (renames++ === 0) {
        server.cut()
        return 'silence'
      }
      server.rename(from, to)
      return NO_SUCH_FILE
    }
    await driver.put('a/b', bytesBody(NEW))
    expect(renames).toBe(2)
    expect([...server.files]).toEqual([['/a/b', NEW]])
  })

  test('and that no retry is left for is a success if the object is there', async () => {
    const { server, driver } = await FakeServer.begin({ retries: 0 })
    loseAnswer(server)
    expect(await driver.put('a/b', bytesBody(NEW))).toMatchObject({ key: 'a/b', size: NEW.length })
    expect([...server.files]).toEqual([['/a/b', NEW]])
  })

  test('is a failure if the object is another one', async () => {
    const { server, driver } = await FakeServer.begin({ retries: 0 })
    loseAnswer(server, to => server.files.set(to, FORMER))
    await expect(driver.put('a/b', bytesBody(NEW))).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
    expect([...server.files]).toEqual([['/a/b', FORMER]])
  })

  test('is no success because a former object has the size of the new one, which was removed', async () => {
    const { server, driver } = await replacing()
    const same = Buffer.from('as long as')
    server.twists.RENAME = (from, to) =>
      to === '/a/b' && from === temporary(server, same) ? FAILURE : undefined
    await expect(driver.put('a/b', bytesBody(same))).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
    expect([...server.files]).toEqual([['/a/b', FORMER]])

    let lost = false
    server.twists.RENAME = () => PERMISSION_DENIED
    server.twists.REMOVE = (path = '') => {
      if (lost) return undefined
      lost = true
      server.files.delete(path)
      server.cut()
      return 'silence'
    }
    await expect(driver.put('a/b', bytesBody(same))).rejects.toMatchObject({
      code: 'STORAGE_ACCESS_DENIED',
      message: expect.stringContaining('Whether a/b is stored all the same is not known'),
    })
    expect([...server.files]).toEqual([['/a/b', FORMER]])
  })

  test('is told to be unknown where the server cannot be asked any more', async () => {
    const { server, driver } = await FakeServer.begin({ retries: 0 })
    loseAnswer(server, () => {
      server.refuses = true
    })
    await expect(driver.put('a/b', bytesBody(NEW))).rejects.toMatchObject({
      code: 'STORAGE_UNREACHABLE',
      message: expect.stringContaining('Whether a/b is stored all the same is not known'),
    })
  })

  /** Gives a file its name, and cuts the connection before it says so. */
  function loseAnswer(server: FakeServer, after: (to: string) => void = () => undefined): void {
    server.twists.RENAME = (from = '', to = '') => {
      server.rename(from, to)
      after(to)
      server.cut()
      return 'silence'
    }
  }
})

/** A server that has an object. */
async function replacing() {
  const { server, driver } = await FakeServer.begin()
  server.folders.add('/a')
  server.files.set('/a/b', FORMER)
  return { server, driver }
}

/** The temporary name under which there are these bytes. */
function temporary(server: FakeServer, bytes: Buffer): string | undefined {
  const found = [...server.files].find(([name, file]) => name.includes('.varve-part-') && file.equals(bytes))
  return found?.[0]
}
